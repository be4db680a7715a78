import os

__version__ = "0.1.0"
METAFLOW_PACKAGE_POLICY = "include" # flows that run elsewhere take this package along
# Threads of LightGBM and implicit that wait for each other sleep, and do not spin: two steps at once on two cores (60 trees on 60,000 rows,
# beside other work) took 15 to 32 s and 8 to 14 s of CPU while they spun, 3 to 4 s and 3.4 s since. Read when these libraries are loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
