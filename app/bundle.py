"""`python -m app.bundle list`, `publish ID`, `rollback`: which bundle is served. Endpoints that follow do so within seconds. `mirror` tells MLflow again."""
import argparse
import getpass
import sys
from pathlib import Path

from app.following import prepared, try_out
from app.telling import tell_people
from reco.aliases import mirror, told
from reco.bundle import BundleError
from reco.bundle_copies import bundle_at
from reco.bundle_store import Root, bundles_root
from reco.published import Publication, earlier_of, publish, rollback, standing
from reco.settings import SettingsError, load_settings


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bundle", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what was published when, by whom and why, and what a rollback would publish")
    acts = [commands.add_parser("publish", help="try a bundle and serve it"), commands.add_parser("rollback", help="serve what was published before")]
    acts[0].add_argument("bundle_id", help="name of its directory")
    commands.add_parser("mirror", help="move MLflow's aliases to what is served and what waits, which every publication does too")
    for act in acts:
        act.add_argument("--why", default="", help="for the history")
        act.add_argument("--who", default=user(), help="for the history; the user of this machine if not given")
    return parser

def user() -> str: # empty where an account has no name, as in some containers
    try: return getpass.getuser()
    except (KeyError, OSError): return ""

def line(p: Publication) -> str: # of the history
    return f"{p.at[:19].replace('T', ' ')}  {p.bundle_id}  {'rollback' if p.back else 'published'} by {p.who or 'nobody named'}" + (f": {p.why}" if p.why else "")

def listed(
    root: Root,
) -> str:
    "The last twenty of the history, then where things stand."
    lines, now = standing(root)
    before = earlier_of(lines, now)
    return "\n".join([*map(line, lines[-20:]), f"current: {now or 'none'}", f"rollback would publish: {before[0] if before else 'nothing'}"])

def try_alone(
    folder: Path, # of a bundle
) -> None:
    "Load a bundle and let it answer, without the online store; raises `BundleError` with what is wrong."
    prepared(folder, try_out)

def act(
    args: argparse.Namespace,
    root: Root,
) -> Publication:
    "Publish or go back; raises `BundleError`."
    if args.command == "rollback": return rollback(root, args.who, args.why, try_alone)
    try_alone(bundle_at(root, args.bundle_id))
    return publish(root/args.bundle_id, args.who, args.why)

def main() -> int: # exit code
    args = arguments().parse_args()
    try:
        settings = load_settings()
        root = bundles_root(settings)
        if args.command == "list":
            print(listed(root))
            return 0
        if args.command != "mirror":
            done = act(args, root)
            print(f"published {done.bundle_id}; before it was {done.before or 'none'}", flush=True)
            for name, said in tell_people(settings, root, done, "app.bundle").items(): print(f"warning: it has not reached {name}: {said}", file=sys.stderr)
    except (SettingsError, BundleError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    trouble = told(settings, lambda: mirror(settings))
    if trouble: print(f"warning: {trouble}", file=sys.stderr)
    return 1 if trouble and args.command == "mirror" else 0

if __name__ == "__main__": sys.exit(main())
