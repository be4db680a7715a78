"""The plots of a training show its tables."""

import io
from dataclasses import asdict

import numpy as np
import polars as pl
import pytest
from matplotlib.figure import Figure

from reco.evaluation.backtest import backtest
from reco.plots import OURS, frontier_figure, ndcg_figure
from reco.reranking.lists import Strengths


def drawn(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def test_bars_are_the_table(trained):
    table = backtest(trained.shop, trained.cutoffs, trained.ranker, trained.settings)
    figure = ndcg_figure(table)
    slices = table["slice"].unique(maintain_order=True).to_list()
    assert [ax.get_title() for ax in figure.axes] == slices and drawn(figure).startswith(b"\x89PNG")
    for ax, name in zip(figure.axes, slices, strict=True):
        part = table.filter(slice=name)
        assert np.allclose([p.get_width() for p in ax.patches], part["NDCG@10"])
        [whiskers] = ax.collections
        assert np.allclose([[s[0][0], s[1][0]] for s in whiskers.get_segments()], part.select("low", "high").to_numpy())
        colours = [tuple(np.round(np.array(p.get_facecolor()[:3])*255).astype(int)) for p in ax.patches]
        assert colours.count(tuple(int(OURS[i:i + 2], 16) for i in (1, 3, 5))) == 1 == len(set(colours[:1])) and len(set(colours)) == 2
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == part["system"].to_list()


def test_a_system_that_is_missing_in_a_slice_keeps_its_place():
    table = pl.DataFrame({"slice": ["all", "all", "home"], "system": ["pipeline", "als", "als"], "NDCG@10": [.3, .2, None], "low": [.2, .1, None],
                          "high": [.4, .3, None]})
    figure = ndcg_figure(table)
    assert len(figure.axes[1].patches) == 2 and np.isnan([p.get_width() for p in figure.axes[1].patches]).all() and drawn(figure)
    assert drawn(ndcg_figure(table.clear()))


def walk(*rows: tuple[str, Strengths, float, float]) -> pl.DataFrame:
    return pl.DataFrame([{"walked": w} | asdict(s) | {"lost": lost, "coverage@10": shown} for w, s, lost, shown in rows])


def test_the_star_is_what_was_chosen():
    chosen = Strengths(tail=.2, keep_first=2)
    table = walk(("", Strengths(), 0., .2), ("tail", Strengths(tail=.1), .002, .3), ("tail, from slot 3", chosen, .008, .5))
    figure = frontier_figure(table, chosen, .01)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert set(lines) >= {"by relevance", "tail", "tail, from slot 3", "chosen"} and drawn(figure).startswith(b"\x89PNG")
    assert (lines["chosen"].get_xdata(), lines["chosen"].get_ydata()) == (pytest.approx([.8]), pytest.approx([50.]))
    assert len({lines[n].get_color() for n in ("by relevance", "tail", "tail, from slot 3")}) == 3
    assert len({lines[n].get_marker() for n in ("by relevance", "tail", "tail, from slot 3")}) == 3


def test_nothing_to_choose_is_an_empty_plot():
    assert drawn(frontier_figure(pl.DataFrame(), Strengths(), .01)).startswith(b"\x89PNG")
    other = frontier_figure(walk(("", Strengths(), 0., .2)), Strengths(tail=.5), .01)  # decided by the settings, never walked
    assert not len({line.get_label(): line for line in other.axes[0].lines}["chosen"].get_xdata())
