"""`flows/ingest.py` as an operator runs it: once on a good folder, then on one that must be refused."""

import base64
import re
import subprocess
from pathlib import Path

from flow_runs import run_flow

from reco.data.lake import Lake

T0 = 1430623510000


def run(folder: Path, raw: Path) -> subprocess.CompletedProcess:
    return run_flow(folder, "ingest", "run", "--source", "retailrocket", "--path", str(raw))


def test_a_good_folder_goes_in_and_a_bad_one_changes_nothing(tmp_path):
    (tmp_path / "settings.ini").write_text("[project]\nname = My Shop\n[quality]\nbad_share = 0.1\nunknown_event_share = 0.1\n")
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder, unknown in ((good, 1), (bad, 5)):
        folder.mkdir()
        (folder / "events.csv").write_text(
            "timestamp,visitorid,event,itemid,transactionid\n"
            + "".join(
                f"{T0 + i * 60_000},{i % 3},{'wishlist' if i < unknown else 'view'},{i % 7},\n" for i in range(20)
            )
        )
    done = run(tmp_path, good)
    assert done.returncode == 0, done.stdout
    assert "19 events of 3 shoppers and 7 items" in done.stdout and "1 rows set aside" in done.stdout
    lake = Lake(tmp_path / "data" / "lake")
    assert (
        lake.read("interactions").collect()["session_id"].null_count() == 0
        and lake.read("catalog").collect().height == 7
    )
    assert lake.read("quarantine").collect().select("file", "row", "reason").rows() == [
        ("events.csv", 2, "unknown event")
    ]
    [html] = (tmp_path / ".metaflow").rglob("blank-*.html")
    assert "A batch from retailrocket\\nPassed the gate" in card_text(html)

    before = {t: lake.snapshot(t) for t in lake.tables()}
    done = run(tmp_path, bad)
    assert done.returncode != 0
    said = done.stdout
    assert "bad_share = 0.25 is over the limit 0.1" in said and "events.csv row 2: event='wishlist'" in said
    assert {t: lake.snapshot(t) for t in lake.tables()} == before
    assert any("Refused; the lake is as it was." in card_text(p) for p in (tmp_path / ".metaflow").rglob("blank-*.html"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".metaflow", "bad", "data", "good", "settings.ini"]


def card_text(html: Path) -> str:
    """A card's text; its components lie in the page as base64."""
    return "".join(
        base64.b64decode(x).decode("utf-8", "replace")
        for x in re.findall(r'__MF_DATA__\[[^\]]*\]\s*=\s*"([^"]+)"', html.read_text())
    )
