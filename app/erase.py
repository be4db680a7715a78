"""Forget users: `python -m app.erase USER_ID [USER_ID ...]` removes them from the lake, from the online store and from the dead letters.

Can be run again safely, and should be when it was interrupted. It is a command and not a flow: a flow's record would keep
the ids. Exit codes: 0 removed, 1 not (all of) it was, with the reason, 2 wrong arguments.
"""
import argparse
import contextlib
import sys
from datetime import UTC, datetime

from reco.batch_store import forget_lists
from reco.data.bus import open_codec, redis_of
from reco.data.lake import open_lake
from reco.data.letters import forget_letters
from reco.data.served import SERVED
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


def forget_aside(
    settings: Settings, # `[stream]`, `[served]`
    store: OnlineStore, # whose Redis may be the bus
    users: list[str],   # user ids
) -> dict[str, int] | None: # stream → letters removed; None where the bus is Kafka, whose topics nobody can change
    "Drop what was set aside of the users' events and lists; raises `BusError`."
    client = redis_of(settings.stream, store.client)
    if client is None: return None
    decoders = {settings.stream.dead_letters: open_codec(settings.stream).decode, settings.served.dead_letters: SERVED.decode}
    return {stream: forget_letters(client, stream, set(users), decode) for stream, decode in decoders.items()}


def erase_letters(
    settings: Settings, # `[online]` and as above
    users: list[str],   # user ids
) -> dict[str, int] | None: # as `forget_aside`
    "Forget the users in the dead letters of the settings' bus; raises `BusError`, `StoreError`."
    with contextlib.closing(open_store(settings)) as store: return forget_aside(settings, store, users)


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
        letters = erase_letters(settings, users)
        if letters is None: print("bus: Kafka keeps dead letters until the retention of their topics ends; nothing was removed there")
        for stream, n in (letters or {}).items(): print(f"bus: {n:,} dead letters of {stream}")
    except (LakeError, SettingsError, StoreError, OSError) as e:
        print(f"not everything was erased, run it again: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__": sys.exit(main())
