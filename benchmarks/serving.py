"""Everything that is measured of the running endpoint, one after the other on one shop: speed, freshness, what happens when something fails, a soak.

Each of them starts the endpoint as `make serve` does and ends it; one that fails does not keep the rest from running, but the run then ends with an error.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from benchmarks.endpoint import shop_arguments

NAMES = "p1_endpoint", "p2_freshness", "never_down", "soak"


def main() -> int:
    """Run all, each in a process of its own; exit code."""
    parser = shop_arguments(__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="some of the benchmarks")
    args, failed = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as made:
        sizes = [word for name in ("items", "users", "events") for word in (f"--{name}", str(getattr(args, name)))]
        where = ["--quick"] if args.quick else ["--shop", str(args.shop or Path(made) / "shop")]
        for name in args.only:
            began = perf_counter()
            code = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sizes, *where, "--results", str(args.results)]).returncode
            failed += [name] * (code != 0)
            print(f"{name}: {'failed' if code else 'done'} in {perf_counter() - began:.0f} s\n", flush=True)
    if failed: print(f"serving: failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__": sys.exit(main())
