import os

__version__ = "0.1.0"
METAFLOW_PACKAGE_POLICY = "include" # flows that run elsewhere take this package along
# Threads of LightGBM and implicit that wait for each other spin a little and then sleep. Read when these libraries are loaded. 60 trees on 60,000 rows with
# two threads on two cores: 0.65 s alone, with GCC's own 300,000 spins, with 1,000 and 1.05 s with none; beside three busy processes 4.5, 2.5 and 2.3 s, beside
# other trainings up to 32 s and 3 s.
if "OMP_WAIT_POLICY" not in os.environ: os.environ.setdefault("GOMP_SPINCOUNT", "1000")
