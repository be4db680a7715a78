"""The steps of `make demo`: what makes each, what it depends on, and whether it is there."""
import contextlib
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from app.reuse import ROOT, Record, Step, code, listing
from reco.challenger import REPORTS, challenger_name, kept_report
from reco.data.lake import open_lake
from reco.features.store import StoreError, open_store, wait_until_ready
from reco.settings import Settings

TRAFFIC_DAYS, CENTS_FROM = 14, 3 # days of shoppers after the training; the day from which their pages send prices in cents, which is what drifts
INGESTED = "ingested"            # in the record: what the lake held when the raw files were in it; traffic comes on top

def steps(
    settings: Settings,
    record: Record,
) -> list[Step]: # in order
    "Simulate, ingest, train, promote, materialize; then some days of traffic, what they earned, and how they differ from before."
    raw, bundles = (settings.path(p).absolute() for p in (settings.data.path, settings.bundles.root))
    generator, library = ROOT/"data"/"generators"/"generate_shop.py", ROOT/"reco"
    about = settings.model_dump(mode="json", exclude={"root", "serving", "app"})
    simulate = Step("simulate", [sys.executable, str(generator), "--later", str(TRAFFIC_DAYS)],
        lambda: {"[simulator]": [about["simulator"], settings.project.seed, str(raw), TRAFFIC_DAYS],
                 "the simulator": code(generator, library/"data"/"simulator.py", library/"data"/"assortment.py")},
        lambda: any(raw.glob("*.parquet")))
    ingest = Step("ingest", [sys.executable, "flows/ingest.py", "run"],
        lambda: {"the raw files": listing(raw), "[data]": [about["data"], about["quality"], settings.lake_root],
                 "the code": code(ROOT/"flows"/"ingest.py", ROOT/"flows"/"base.py", library/"data", library/"schemas.py")},
        lambda: "interactions" in lake_states(settings))
    train = Step("train", [sys.executable, "flows/train.py", "run"],
        lambda: {"the lake": raw_states(settings, record), "the settings": [{k: v for k,v in about.items() if k not in ("simulator", "data", "online", "stream", "gates", "search")},
                                                            str(bundles)],
                 "the code": code(ROOT/"flows"/"train.py", ROOT/"flows"/"base.py", library)},
        lambda: bool(challenger_name(bundles)))
    promote = Step("promote", [sys.executable, "flows/promote.py", "run"],
        lambda: {"the challenger": challenger_name(bundles), "[gates]": about["gates"],
                 "the code": code(ROOT/"flows"/"promote.py", ROOT/"flows"/"base.py", library)},
        lambda: (bundles/"current").is_file(), lambda since: declined(bundles, since))
    materialize = Step("materialize", [sys.executable, "flows/materialize.py", "run"],
        lambda: {"the lake": raw_states(settings, record), "the bundle": listing(bundles/"current"), "[online]": [about["online"], about["train"]["max_history"]],
                 "the code": code(ROOT/"flows"/"materialize.py", ROOT/"flows"/"base.py", library)},
        lambda: knows_someone(settings))
    made = [ingest, train, promote, materialize]
    return [simulate, *made, *lived(settings, raw, library)] if settings.data.source == "simulator" else made

def lived(
    settings: Settings,
    raw: Path,     # folder of the simulated shop
    library: Path, # reco/
) -> list[Step]:   # in order
    "Traffic, and what flows make of it: without it half of the app's pages would have nothing to show."
    there = lambda table: lambda: table in open_lake(settings).tables()
    flow = lambda name: code(ROOT/"flows"/f"{name}.py", ROOT/"flows"/"base.py")
    traffic = Step("traffic", [sys.executable, "-m", "app.traffic", "--cents-from", str(CENTS_FROM)],
        lambda: {"the days": listing(raw/"later"), "the code": code(ROOT/"app"/"traffic.py", library/"data"/"shoppers.py")}, there("exposures"))
    kpis = Step("kpis", [sys.executable, "flows/kpis.py", "run"],
        lambda: {"the days": traffic.inputs(), "today": f"{datetime.now(UTC):%Y-%m-%d}", "the code": flow("kpis")}, there("kpis"))
    monitor = Step("monitor", [sys.executable, "flows/monitor.py", "run", "--retrain", "never", "--since", first_day(raw)],
        lambda: {"the days": traffic.inputs(), "the code": flow("monitor")}, there("verdicts"))
    refresh = Step("refresh", [sys.executable, "flows/materialize.py", "run"], lambda: {"the days": traffic.inputs()}, lambda: knows_someone(settings))
    return [traffic, kpis, monitor, refresh]

def first_day(
    raw: Path, # folder of the simulated shop
) -> str:      # YYYY-MM-DD; empty before it is made
    "The day on which traffic begins."
    try: return str(json.loads((raw/"shop.json").read_text("utf-8"))["end"])[:10]
    except (FileNotFoundError, ValueError, KeyError, TypeError): return ""

EXPERIMENT = """# Made by make demo: is more variety worth what it costs? A file of your own: [experiments] file in settings.ini
[[experiment]]
name = "variety"
from = {since}T00:00:00Z
share = 0.6

[[experiment.variant]]
name = "as_it_is"
weight = 0.5

[[experiment.variant]]
name = "more_variety"
weight = 0.5
rerank = {{diversity = 4.0, keep_first = 0}}
"""

def experiments_file(
    settings: Settings,
    folder: Path, # of the demo
) -> Path|None:   # None where the settings name a file, or there is no simulated shop yet
    "An A/B test that runs since the first day of traffic; written once for a shop."
    since = first_day(settings.path(settings.data.path).absolute())
    if settings.experiments.file or settings.data.source != "simulator" or not since: return None
    path, text = folder/"experiments.toml", EXPERIMENT.format(since=since)
    if not path.is_file() or path.read_text("utf-8") != text:
        part = path.with_suffix(".tmp")
        part.write_text(text, "utf-8")
        part.replace(path)
    return path

def raw_states(
    settings: Settings,
    record: Record,
) -> dict[str, str]: # table → snapshot
    "What the lake held when the raw files were in it."
    return record.steps.get(INGESTED) or lake_states(settings)

def declined(
    bundles: Path, # their folder
    since: float,  # s; an older verdict says nothing
) -> str:          # empty when it passed, or was not judged
    "Which gates kept the newest bundle from being served."
    path = bundles/REPORTS/f"{challenger_name(bundles)}.json"
    report = kept_report(bundles, challenger_name(bundles)) if path.is_file() and path.stat().st_mtime >= since - 1 else None
    failed = [g["name"] for g in report["gates"] if not g["passed"]] if report else []
    return f"not promoted, the bundle before goes on: {', '.join(failed)}" if failed else ""

def lake_states(
    settings: Settings,
) -> dict[str, str]: # table → snapshot, of those that a model is made of
    "What the lake holds; raises `LakeError`."
    lake = open_lake(settings)
    return {t: lake.snapshot(t) for t in ("interactions", "catalog") if t in lake.tables()}

def knows_someone(
    settings: Settings,
) -> bool:
    "Whether the online store has a shopper's past."
    try:
        with contextlib.closing(open_store(settings)) as store:
            wait_until_ready(store.client) # it may have been started by this very question
            return store.someone() is not None
    except StoreError: return False

class OtherShop(RuntimeError):
    "The lake holds another simulated shop and cannot be renamed; the message says where it is."

def set_aside(
    settings: Settings,
    record: Record,
    ingest: Step,
) -> None:
    "Another simulated shop must not be poured over the one in the lake: that lake is renamed, never deleted."
    if settings.data.source != "simulator": return
    holds, raw = record.steps.get("lake"), {"the raw files": ingest.inputs()["the raw files"]}
    record.keep("lake", raw)
    if "://" in settings.lake_root and holds not in (None, raw):
        raise OtherShop(f"{settings.lake_root} holds another simulated shop; name another place with RECO_LAKE_ROOT")
    lake = Path(settings.lake_root)
    if holds in (None, raw) or not lake.is_dir(): return
    aside = lake.with_name(f"{lake.name}.until-{time.strftime('%Y%m%dT%H%M%S')}")
    lake.rename(aside)
    print(f"      the lake holds another simulated shop; it is kept as {aside}", flush=True)
