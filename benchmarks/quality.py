"""Every table of quality, with its peers, in one run: each data set is given once, each benchmark writes its own results.

What has no data is named and left out. A table that was there before is looked at once more, and says so (`test_looks`); retrieval asks only
before the days from which the others test. A benchmark that fails does not keep the rest from running, but the run then ends with an error.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from json import loads
from pathlib import Path
from time import perf_counter

from benchmarks import frontier, holdout, q1_sessions, q2_purchases, q3_baskets, q4_cold_items, retrieval
from benchmarks.base import RESULTS, arguments, render

MAINS: dict[str, Callable[[list[str]], None]] = {
    m.__name__.rpartition(".")[2]: m.main for m in (q1_sessions, q2_purchases, q3_baskets, q4_cold_items, holdout, frontier, retrieval)}


def events_of(folder: Path) -> Path:
    """RetailRocket's log in its folder, perhaps gzipped."""
    return next((p for p in (folder / "events.csv", folder / "events.csv.gz") if p.exists()), folder / "events.csv")


def commands(args: argparse.Namespace) -> dict[str, list[str] | str]:
    """Benchmark → its arguments, or the option without which it has no data."""
    sessions, rocket, retail = args.retailrocket_sessions, args.retailrocket, args.online_retail
    no = {o: f"no --{o} given" for o in ("retailrocket-sessions", "retailrocket", "online-retail")}
    out: dict[str, list[str] | str] = dict.fromkeys(MAINS, no["retailrocket"])
    out["q1_sessions"] = no["retailrocket-sessions"]
    out["q3_baskets"] = out["q4_cold_items"] = no["online-retail"]
    if sessions: out["q1_sessions"] = ["--train", sessions / "train_sessions.csv.gz", "--test", sessions / "test_instances.csv.gz"]
    if rocket:
        out["q2_purchases"] = ["--events", events_of(rocket), *(["--peers-python", args.peers_python] if args.peers_python else [])]
        out["holdout"] = out["frontier"] = ["--source", "retailrocket", "--path", rocket]
    if retail: out["q3_baskets"] = out["q4_cold_items"] = ["--events", retail]
    logs = [x for x in (("retailrocket", rocket, args.until[0]), ("online_retail", retail, args.until[1])) if x[1]]
    if logs or args.simulator:
        several = zip(("--source", "--path", "--until"), zip(*logs, strict=True), strict=True) if logs else ()
        out["retrieval"] = [word for option, values in several for word in (option, *values)] + ["--simulator"] * args.simulator
    return {name: [str(w) for w in words] if isinstance(words, list) else words for name, words in out.items()}


def looks(name: str, results: Path) -> list[str]:
    """The count of looks at a test part, this one included."""
    path = results / f"{name}.json"
    return [] if name == "retrieval" else ["--test-looks", str(1 + (loads(path.read_text())["test_looks"] if path.exists() else 0))]


def counted(name: str, words: list[str], results: Path) -> list[str]:
    """A benchmark's arguments with where its results go and how often its test part was looked at."""
    return [*words, *looks(name, results), *([] if results == RESULTS else ["--results", str(results)])]


def main(argv: list[str] | None = None) -> None:
    """Run what has data, then make the page anew."""
    parser = arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--retailrocket-sessions", type=Path, help="folder with train_sessions.csv.gz and test_instances.csv.gz")
    parser.add_argument("--retailrocket", type=Path, help="folder with RetailRocket's events.csv and, if there, its item properties")
    parser.add_argument("--online-retail", type=Path, help="file of Online Retail (.csv, .csv.gz, .xlsx)")
    parser.add_argument("--simulator", action="store_true", help="the simulator's shop in the table of retrieval too")
    parser.add_argument("--until", nargs=2, default=["2015-08-15", "2011-10-01"], metavar=("RETAILROCKET", "ONLINE_RETAIL"),
                        help="first test days of the two logs: retrieval reads nothing from there on")
    parser.add_argument("--peers-python", type=Path, help="Python of an environment with benchmarks/requirements-peers.txt")
    parser.add_argument("--only", nargs="+", choices=MAINS, default=list(MAINS), help="some of the benchmarks")
    args = parser.parse_args(argv)
    given, failed = commands(args), []
    for name in args.only:
        words = ["--quick", "--results", str(args.results)] if args.quick else given[name]
        if isinstance(words, str):
            print(f"{name}: not run, {words}")
            continue
        start = perf_counter()
        try: MAINS[name](words if args.quick else counted(name, words, args.results))
        except (Exception, SystemExit) as e:  # the others still run, and the run ends with an error
            failed.append(name)
            traceback.print_exception(e)
        print(f"{name}: {'failed' if name in failed else 'done'} in {perf_counter() - start:.0f} s\n")
    if not args.quick and args.results == RESULTS: render()
    if failed: sys.exit(f"quality: failed: {', '.join(failed)}")


if __name__ == "__main__": main()
