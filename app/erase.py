"""Forget users: `python -m app.erase USER_ID [USER_ID ...]` removes them from the lake and from the online store.

Can be run again safely, and should be when it was interrupted. It is a command and not a flow: a flow's record would keep
the ids. Exit codes: 0 removed, 1 not (all of) it was, with the reason, 2 wrong arguments.
"""
import argparse
import contextlib
import sys
from datetime import UTC, datetime

from reco.batch_store import forget_lists
from reco.data.lake import open_lake
from reco.data.storage import LakeError
from reco.data.upkeep import erase
from reco.features.store import OnlineStore, StoreError, open_store, wait_until_ready
from reco.settings import Settings, SettingsError, load_settings


def forget(
    store: OnlineStore,
    users: list[str], # user ids
) -> int:             # how many of them it knew
    "Drop the users' events and the lists that were made for them; raises `StoreError`."
    forget_lists(store, users)
    return sum(store.erase(user) for user in sorted(set(users)))


def erase_online(
    settings: Settings, # `[online]`
    users: list[str],   # user ids
) -> int:               # how many of them it knew
    "Forget the users in the store of the settings; raises `StoreError`."
    with contextlib.closing(open_store(settings)) as store:
        wait_until_ready(store.client)
        return forget(store, users)


def erase_lake(
    settings: Settings, # `[lake]`
    users: list[str],   # user ids
) -> dict[str, int]:    # table → rows removed
    "Remove the users from every table; raises `LakeError`."
    return dict(erase(open_lake(settings), users, datetime.now(UTC)).rows())


def main(
    args: list[str] | None = None, # the command line's when not given
) -> int:                          # exit code
    "Erase from the lake first: it is what everything else is made of."
    parser = argparse.ArgumentParser(prog="python -m app.erase", description="forget users: their events, features and logs")
    parser.add_argument("users", nargs="+", metavar="USER_ID", help="the shop's own id of a user")
    users = parser.parse_args(args).users
    if empty := sum(not u.strip() for u in users): parser.error(f"{empty} of {len(users)} user ids are empty")
    try:
        settings = load_settings()
        for table, rows in erase_lake(settings, users).items(): print(f"lake: {rows:,} rows of {table}")
        print(f"online store: {erase_online(settings, users):,} of {len(set(users)):,} users were there")
    except (LakeError, SettingsError, StoreError, OSError) as e:
        print(f"not everything was erased, run it again: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__": sys.exit(main())
