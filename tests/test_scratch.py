"""What the steps of a run hand to each other: the same on a disk and on S3, whole or refused, gone when the run is over."""

import os
from datetime import UTC, datetime, timedelta
from io import BytesIO
from tempfile import TemporaryFile

import hypothesis.extra.numpy as hnp
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_lake_s3 import bucket, endpoint, section  # noqa: F401  (a fixture)

from reco.data.scratch import FOLDER, LINE, Scratch, ScratchError, packed, remove_left, unpacked
from reco.settings import Lake

ARRAYS = hnp.arrays(st.sampled_from([np.float32, np.int64, np.int8, np.bool_, np.dtype("<U3")]), hnp.array_shapes(min_dims=1, min_side=0, max_side=7))


def read_back(whole: bytes) -> object:
    with TemporaryFile() as file:
        file.write(whole)
        return unpacked(file)


@given(st.dictionaries(st.text(max_size=3), ARRAYS, max_size=4), st.booleans())
def test_what_was_put_comes_back(arrays, turned):
    if turned: arrays = {k: a.T for k, a in arrays.items()}  # not as they lie in memory
    whole = b"".join(packed(arrays))
    back = read_back(whole)
    assert len(whole) % LINE == 0 and back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and np.array_equal(back[name], array, equal_nan=array.dtype.kind == "f")


def test_frames_and_objects_come_back():
    what = {"frame": pl.DataFrame({"a": [1, None], "b": ["x", "y"]}), "when": datetime(2026, 1, 1, tzinfo=UTC), "none": None}
    back = read_back(b"".join(packed(what)))
    assert back["frame"].equals(what["frame"]) and back["when"] == what["when"] and back["none"] is None


def test_arrays_lie_at_lines_of_cache_and_take_writes():
    whole = b"".join(packed([np.arange(5, dtype=np.int8), np.arange(9.0)]))
    back = read_back(whole)
    assert all(a.ctypes.data % LINE == 0 and a.flags.writeable for a in back)


@given(st.integers(0, 10_000))
def test_a_file_that_was_cut_off_is_refused(at):
    whole = b"".join(packed({"a": np.arange(1_000), "b": "text"}))
    with pytest.raises(ValueError, match="written|no object"): read_back(whole[:min(at, len(whole) - 1)])


@pytest.mark.parametrize("content", [b"", b"x" * 64, b"\0" * 640, BytesIO(b"PK\3\4" * 100).getvalue()])
def test_another_file_is_refused(content):
    with pytest.raises(ValueError, match="something else|no object"): read_back(content)


def test_a_step_that_fails_leaves_nothing_half_written(tmp_path):
    scratch = Scratch(tmp_path, Lake(), "run")
    with pytest.raises((TypeError, AttributeError)): scratch.put("a", lambda: 0)
    assert list((tmp_path / FOLDER / "run").iterdir()) == []
    with pytest.raises(ScratchError, match="keeps no 'a' any more.*run anew"): scratch.get("a")


@pytest.mark.parametrize("run", ["", "../up", "a/b", "a b"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, run):
    with pytest.raises(ValueError, match="letters, digits"): Scratch(tmp_path, Lake(), run)


def test_s3_is_the_same(endpoint):  # noqa: F811
    root = f"s3://{bucket(endpoint)}/shop/lake"
    where = section(endpoint, root=root)
    scratch, other = Scratch(root, where, "run"), Scratch(root, where, "run-2")
    scratch.put("shop", {"a": np.arange(1_000_000), "b": None})
    other.put("shop", "another")
    back = scratch.get("shop")
    back["a"][0] = 7
    assert np.array_equal(back["a"][1:], np.arange(1, 1_000_000)) and scratch.get("shop")["a"][0] == 0
    scratch.remove()
    with pytest.raises(ScratchError, match="run keeps no 'shop' any more"): scratch.get("shop")
    assert other.get("shop") == "another"
    now = datetime.now(UTC)
    assert remove_left(root, where, now - timedelta(days=7)) == [] and remove_left(root, where, now + timedelta(days=7)) == ["run-2"]


def test_only_what_was_left_for_long_is_removed(tmp_path):
    for run in ("old", "at-work", "half"): Scratch(tmp_path, Lake(), run).put("shop", np.arange(10))
    now, long_ago = datetime.now(UTC), datetime.now(UTC).timestamp() - 10 * 86_400
    for path in [tmp_path / FOLDER / "old", *(tmp_path / FOLDER / "old").iterdir(), tmp_path / FOLDER / "half"]: os.utime(path, (long_ago, long_ago))
    assert remove_left(tmp_path, Lake(), now - timedelta(days=7)) == ["old"]  # `half` has a younger file
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == ["at-work", "half"]
    assert remove_left(tmp_path / "nowhere", Lake(), now) == []
