"""The tables, the page and the figures of an ensemble."""

import dataclasses
import json
import math

import numpy as np
import pytest

from medtl_jax.metrics.seeds import Estimate, Judged
from medtl_jax.report.ensemble import (
    FUSION,
    MEMBER,
    SOUP,
    Diversity,
    Ensemble,
    NetworkCost,
    Rejection,
    Row,
    conclusions,
    ensemble_table,
    write_ensemble,
)
from medtl_jax.report.ensemble_figures import diversity_figure, ensemble_figures, rows_figure
from medtl_jax.report.study_page import to_json
from medtl_jax.report.style import encode_png

HOSTILE = "<b>net|$x$</b>"
STUDY = {
    "title": "Ensemble: digits",
    "command": "python launch.py",
    "config": {"seed": 0},
    "environment": {"python": "3"},
    "commands": {"first": "python launch.py --config.seed=0"},
}


def estimate(value: float, half: float = 0.02) -> Estimate:
    ends = (value - half, value + half)
    return Estimate(value, (value,), math.nan, ends, ends, None, 0.5)


def row(name: str, kind: str, auc: float, verdict: str = "", **fields) -> Row:
    judged = {"auc": Judged(estimate(auc - 0.8), 0.04, verdict)} if verdict else {}
    usual = {
        "made_of": {"folder": f"cells/{name}"} if kind == MEMBER else {"weights": None},
        "validation": 0.5,
        "test": {"auc": estimate(auc)},
        "against": judged,
        "calibration": {"ece": (0.1, 0.05), "brier": (0.3, 0.2), "nll": (0.9, math.nan)},
        "unscaled": "",
        "networks": 1 if kind != FUSION else 2,
        "cost": NetworkCost(2_000_000, 1.5),
    }
    return Row(name, kind, **{**usual, **fields})


def entry(value: float) -> dict:
    return {"value": value, "ci95": [value - 0.01, value + 0.01], "n": 40}


def ensemble(verdict: str = "better", **fields) -> Ensemble:
    curve = Rejection(
        "predictive entropy",
        "share of wrong images",
        (0.0, 0.5),
        (0.2, 0.1),
        (0.2, 0.0),
        {name: entry(0.1) for name in ("area", "area_random", "area_oracle", "gain")},
    )
    usual = {
        "rows": (
            row("one", MEMBER, 0.7),
            row(HOSTILE, MEMBER, 0.8),
            row("mean", FUSION, 0.9, verdict),
            row("greedy", FUSION, 0.85, "cannot tell", made_of={"weights": [0.25, 0.75]}),
            row("rank", FUSION, 0.75, "cannot tell", calibration={}, validation=None),
            row("uniform soup", SOUP, 0.78, "worse", made_of={"members": ["one", HOSTILE]}),
        ),
        "best": HOSTILE,
        "picked": "mean",
        "select": "loss",
        "summaries": {name: f"the {name}" for name in ("mean", "greedy", "rank")},
        "diversity": {
            "kappa": Diversity(((1.0, 0.5), (0.5, 1.0)), 0.5, ""),
            "q": Diversity(((1.0, math.nan), (math.nan, 1.0)), math.nan, "no case"),
        },
        "uncertainty": {"predictive entropy": 0.4},
        "rejections": (curve,),
        "images": 40,
        "patients": 20,
        "device": "CPU",
        "batch": 64,
        "notes": ("a | note",),
    }
    return Ensemble(**{**usual, **fields})


def test_a_gain_is_said_and_so_is_none():
    gain = next(line for line in conclusions(ensemble()) if line.startswith("AUC: "))
    assert ": 0.1000 (0.0800 to 0.1200): better; no other row is better" in gain
    for verdict in ("cannot tell", "worse"):
        lines = conclusions(ensemble(verdict))
        assert any(f": {verdict}, no gain shown; no other row is better" in line for line in lines)
    rows = ensemble().rows
    better = dataclasses.replace(rows[3], against={"auc": Judged(estimate(0.05), 0.01, "better")})
    other = ensemble(
        "cannot tell", rows=(*rows[:2], row("mean", FUSION, 0.8, "cannot tell"), better)
    )
    assert any("no gain shown; better: greedy" in line for line in conclusions(other))


def test_the_table_has_every_row_and_its_cost():
    words = ensemble_table(ensemble())
    table = [line for line in words.splitlines() if line.startswith("| ")]
    mean = next(line for line in table if line.startswith("| mean (picked) "))
    cells = [cell.strip() for cell in mean.strip("|").split("|")]
    assert cells == [
        "mean (picked)", "fusion", "0.9000 (0.8800 to 0.9200)", "better",
        "0.1000 (0.0800 to 0.1200)", "0.04", "0.5000", "2", "2", "1.50",
    ]  # fmt: skip
    # A bar in a name is no column.
    assert any("net\\|$x$</b> (best member)" in line for line in table)
    assert "40 images of 20 patients" in words and "other test patients" in words
    assert "Yule's Q: no case" in words and "a | note" in words
    calibrated = words.split("temperature scaling:")[1]
    assert "| rank " not in calibrated and "| greedy " in calibrated


def test_nothing_to_pick_by_is_said():
    rows = (row("one", MEMBER, 0.7, validation=None), row("mean", FUSION, 0.7, validation=None))
    found = ensemble(rows=rows, best="", picked="", rejections=(), uncertainty={})
    assert conclusions(found) == ["validation loss picks nothing: no row has a value to pick by"]
    assert "the best member" in ensemble_table(found)
    assert rows_figure(found, "auc").axes


def test_the_page_is_safe_and_the_same_again(tmp_path):
    found = ensemble()
    for name in ("a", "b"):
        figures = ensemble_figures(found)
        write_ensemble(tmp_path / name, found=found, figures=figures, **STUDY)
    page = (tmp_path / "a").read_text(encoding="utf-8")
    assert (tmp_path / "b").read_text(encoding="utf-8") == page
    assert "<b>net" not in page and "&lt;b&gt;net|$x$&lt;/b&gt;" in page
    assert "0.250 one; 0.750 &lt;b&gt;net" in page and "▲ better" in page
    assert {"auc", "calibration", "rejection", "kappa"} == figures.keys()
    json.dumps(to_json(found), allow_nan=False)


@pytest.mark.parametrize("count", [3, 12])
def test_the_pairs_that_are_defined_are_drawn(count):
    matrix = np.full((count, count), 0.25)
    matrix[0, 1] = matrix[1, 0] = math.nan
    figure = diversity_figure([f"member {i}" for i in range(count)], matrix, "disagreement")
    drawn = figure.axes[0].images[0].get_array()
    assert np.ma.count(np.ma.masked_invalid(drawn)) == count * count - count - 2
    annotated = count * count - count - 2 if count <= 10 else 0
    assert len(figure.axes[0].texts) == annotated
    assert encode_png(figure)
