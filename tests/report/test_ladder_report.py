"""The table, the page and the figures of a ladder."""

import dataclasses
import json
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from matplotlib.figure import Figure

from medtl_jax.metrics.seeds import Estimate, Judged
from medtl_jax.report.ladder import (
    Cost,
    Ladder,
    Level,
    Rung,
    ladder_table,
    percent,
    write_ladder,
)
from medtl_jax.report.ladder_figures import (
    _spread,
    costs_figure,
    curves_figure,
    ladder_figures,
    rows_figure,
)
from medtl_jax.report.study_page import to_json
from medtl_jax.report.style import encode_png

NAMES = ("scratch", "knn", "probe", "full", "l2sp")


def estimate(value: float, half: float = 0.02, **changes) -> Estimate:
    ends = (value - half, value + half)
    return dataclasses.replace(
        Estimate(value, (value, value), 0.01, ends, ends, ends, 0.5), **changes
    )


def rung(name: str, value: float, seconds: float = 10.0, metric: str = "auc") -> Rung:
    verdict = Judged(estimate(value - 0.9), 0.04, "better" if value > 0.9 else "worse")
    return Rung(
        name,
        (f"cells/{name}-10-0", f"cells/{name}-10-1"),
        (0.5, 0.3),
        {metric: estimate(value), "accuracy": estimate(value - 0.1)},
        {} if name == "full" else {metric: verdict, "accuracy": verdict},
        Cost(seconds / 2, seconds, None if name in ("knn", "probe") else 5e8),
    )


def ladder(fractions=(0.1, 1.0), metric: str = "auc", **changes) -> Ladder:
    values = dict(zip(NAMES, (0.6, 0.85, 0.88, 0.9, 0.93), strict=True))
    levels = tuple(
        Level(
            fraction,
            (int(1000 * fraction), int(1000 * fraction) + 2),
            (200, 200),
            fraction < 1,
            tuple(rung(n, v + 0.05 * fraction, 10 * fraction, metric) for n, v in values.items()),
            "probe" if fraction < 1 else "l2sp",
        )
        for fraction in fractions
    )
    summaries = {name: f"what <{name}> is" for name in NAMES}
    set_keys = {name: {"transfer.alpha": 0.5, "model.weights": f"<{name}>"} for name in NAMES}
    found = Ladder(levels, summaries, set_keys, "full", "loss", 2, 624, None, "CPU")
    return dataclasses.replace(found, **changes)


def undefined(found: Ladder) -> Ladder:
    """The same with a first strategy whose metric is undefined."""
    none = Estimate(math.nan, (math.nan,), math.nan, reason="undefined on the test split")
    levels = []
    for level in found.levels:
        first, *others = level.rungs
        first = dataclasses.replace(first, test={**first.test, "auc": none}, validation=(None, 1.0))
        levels.append(dataclasses.replace(level, rungs=(first, *others)))
    return dataclasses.replace(found, levels=tuple(levels))


def rows_of(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]


def test_the_table_says_values_differences_verdicts_costs_and_picks():
    text = ladder_table(ladder())
    head, rule, *rows = rows_of(text)
    assert head == [
        "strategy", "AUC (95 % CI)", "verdict", "minus full (95 % CI)", "sd", "val loss", "CPU s",
        "MB",
    ]  # fmt: skip
    assert all(set(cell) == {"-"} for cell in rule)
    by_name = {row[0]: row[1:] for row in rows[:5]}
    assert by_name["scratch"] == [
        "0.6050 (0.5850 to 0.6250)", "worse", "-0.2950 (-0.3150 to -0.2750)", "0.0100", "0.4000",
        "1.0", "500",
    ]  # fmt: skip
    assert by_name["probe (picked)"][-1] == "", "no step was compiled"
    assert by_name["full"][1:3] == ["", ""]
    lines = text.splitlines()
    assert "- 10% of the labels (100 to 102 images + 200 of validation): " in lines[0]
    assert "validation picks probe; test AUC" in lines[0]
    assert "validation picks l2sp" in lines[1]
    assert len([row for row in rows_of(text) if row[0] == "full"]) == 4
    # As plain text the columns stand under each other.
    table = [line for line in lines if line.startswith("| ")][:7]
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in table}) == 1


def test_what_the_intervals_cover_is_said():
    several, one = ladder_table(ladder()), ladder_table(ladder(seeds=1))
    assert "cover other test images (bootstrap" in several and "other seeds" in several
    assert "At 10 % of the labels a seed is another draw of training images" in several
    assert "At 100 % all seeds train on the same images" in several
    assert "one seed says nothing" in one and "At 10" not in one
    below = ladder_table(ladder(fractions=(0.01, 0.05, 0.1)))
    assert "At 1, 5 and 10 % of" in below and "all seeds train on the same" not in below
    whole = ladder(fractions=(1.0,))
    assert "another draw" not in ladder_table(whole)
    few_a_class = dataclasses.replace(whole.levels[0], drawn=True)
    text = ladder_table(dataclasses.replace(whole, levels=(few_a_class,)))
    assert "At 100 % of the labels a seed is another draw" in text and "all seeds train" not in text
    by_patient = ladder_table(ladder(patients=300))
    assert "624 images of 300 patients" in by_patient and "other test patients" in by_patient


def test_the_labels_of_validation_are_counted():
    found = ladder()
    text = ladder_table(found)
    assert "**10% of the labels: 100 to 102 images + 200 of validation, 2 seeds**" in text
    assert "at every fraction 200 validation images come on top" in text
    for figure in ladder_figures(found).values():
        assert "200 validation images come on top" in figure.get_label()
    assert "and of 200 validation images" in rows_figure(found, "auc").get_label()


def test_costs_that_are_not_known_are_empty():
    found = ladder()
    levels = []
    for level in found.levels:
        rungs = [dataclasses.replace(rung, cost=Cost(None, None, None)) for rung in level.rungs]
        levels.append(dataclasses.replace(level, rungs=(*rungs[:4], level.rungs[4])))
    some = dataclasses.replace(found, levels=tuple(levels))
    none = dataclasses.replace(some, levels=(dataclasses.replace(levels[0], rungs=tuple(rungs)),))
    row = next(row for row in rows_of(ladder_table(some)) if row[0] == "full")
    assert row[-2:] == ["", ""]
    (note,) = costs_figure(some, "auc").axes[0].texts
    assert note.get_text() == "l2sp"
    figure = costs_figure(none, "auc")
    encode_png(figure)
    assert not figure.axes[0].texts


def test_notes_of_the_runs_are_listed():
    noted = ladder(notes=("head: cached features are not augmented | once",))
    text = ladder_table(noted)
    assert text.endswith("Notes of the runs:\n\n- head: cached features are not augmented | once\n")
    assert "Notes" not in ladder_table(ladder())


def test_nothing_undefined_is_a_number():
    found = undefined(ladder())
    row = next(row for row in rows_of(ladder_table(found)) if row[0] == "scratch")
    assert row[1] == "undefined" and row[4] == "" and row[5] == "undefined"
    nobody = dataclasses.replace(found.levels[0], picked="")
    text = ladder_table(dataclasses.replace(found, levels=(nobody, found.levels[1])))
    assert "no strategy has a validation loss to pick by" in text
    parsed = json.loads(json.dumps(to_json(found), allow_nan=False))
    first = parsed["levels"][0]["rungs"][0]
    assert first["test"]["auc"]["value"] is None and first["test"]["auc"]["interval"] is None
    assert parsed["levels"][1]["rungs"][3]["test"]["auc"]["by_seed"] == pytest.approx([0.95, 0.95])


def test_the_page_is_whole_and_safe(tmp_path):
    found = ladder()
    path = tmp_path / "report.html"
    content = {
        "ladder": found,
        "title": "Ladder: <script>",
        "command": "python launch.py <b>",
        "config": {"seed": 0},
        "environment": {"backend": "cpu"},
        "commands": {"full-10-0": "python launch.py --config.seed=0"},
        "figures": {"curves_auc": curves_figure(found, "auc")},
    }
    write_ladder(path, **content)
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page and "python launch.py <b>" not in page
    assert "what &lt;full&gt; is" in page and "model.weights=&lt;full&gt;" in page
    assert (
        "transfer.alpha=0.5; " in page
        and "to float tolerance" in page
        and "▲ better" in page
        and "▼ worse" in page
    )
    assert page.count("<img") == 1 and "full-10-0" in page
    first = path.read_bytes()
    write_ladder(path, **content)
    assert path.read_bytes() == first


def axes_of(figure: Figure, title: str):
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == title)


def lines_of(axes, **wanted) -> list:
    return [
        line
        for line in axes.lines
        if all(getattr(line, f"get_{key}")() == value for key, value in wanted.items())
    ]


def test_curves_show_each_strategy_over_the_images():
    figure = curves_figure(ladder(), "auc")
    encode_png(figure)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [*NAMES, ""]
    probe = axes_of(figure, "probe")
    (own,) = lines_of(probe, marker="o", markersize=4)
    np.testing.assert_allclose(own.get_xdata(), [101, 1001])
    np.testing.assert_allclose(own.get_ydata(), [0.885, 0.93])
    (reference,) = lines_of(probe, linestyle="--")
    assert reference.get_zorder() > own.get_zorder()
    np.testing.assert_allclose(reference.get_ydata(), [0.905, 0.95])
    (ring,) = lines_of(probe, markersize=11)
    np.testing.assert_allclose(ring.get_xydata(), [[101, 0.885]])
    assert not lines_of(axes_of(figure, "knn"), markersize=11)
    assert axes_of(figure, "full").title.get_text() == "" and probe.get_xscale() == "log"
    band = probe.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.865) and band[:, 1].max() == pytest.approx(0.95)


def test_captions_name_the_scales_and_the_ring():
    drawn = {**ladder_figures(ladder()), "rows": rows_figure(ladder(), "auc")}
    captions = {name: figure.get_label() for name, figure in drawn.items()}
    scale = "log scale of what is missing to 1"
    assert all("orange ring: what validation picks" in words for words in captions.values())
    assert (
        "labelled images (log scale)" in captions["curves_auc"] and scale in captions["curves_auc"]
    )
    assert "of one run (log scale)" in captions["costs_auc"] and scale in captions["costs_auc"]
    plain = curves_figure(ladder(metric="mae"), "mae").get_label()
    assert "labelled images (log scale)" in plain and scale not in plain
    assert scale not in captions["rows"]


def test_the_seconds_are_without_compilation():
    assert "the mean of one run without compilation" in ladder_table(ladder())


def test_the_axis_tells_good_values_apart():
    """From 0.93 to 0.98 is as far as from 0.6 to 0.9, where a plain axis has a sixth of that."""
    axes = curves_figure(ladder(), "auc").axes[0]
    low, high = axes.get_ylim()
    assert low < 0.585 and 0.999 < high <= 1.0

    def place(value: float) -> float:
        return axes.transData.transform((100, value))[1]

    share = (place(0.98) - place(0.93)) / (place(0.9) - place(0.6))
    assert share > 0.6
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert len(ticks) >= 4
    gaps = np.diff([place(tick) for tick in sorted(ticks)]) / (place(high) - place(low))
    assert gaps.min() >= 0.13 - 1e-9


def test_an_error_has_a_plain_axis():
    figure = curves_figure(ladder(metric="mae"), "mae")
    low, high = figure.axes[0].get_ylim()
    assert figure.axes[0].get_yscale() == "linear"
    assert low < 0.585 and 1.0 < high < 1.1


def test_costs_name_every_strategy_once_and_apart():
    figure = costs_figure(ladder(), "auc")
    encode_png(figure)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "10 % of the labels",
        "100 % of the labels",
    ]
    for axes in figure.axes:
        assert {note.get_text() for note in axes.texts} == set(NAMES)
        heights = sorted(note.xyann[1] for note in axes.texts)
        assert np.diff(heights).min() >= 1 / 6 - 1e-6 and 0 <= heights[0] <= heights[-1] <= 1
        # All runs took the same time, and are on the axis all the same.
        left, right = axes.get_xlim()
        assert left < 1.0 < 10.0 < right
    (black,) = lines_of(figure.axes[0], marker="s")
    np.testing.assert_allclose(black.get_xydata(), [[1.0, 0.905]])


def test_one_fraction_has_rows_instead_of_curves():
    one = undefined(ladder(fractions=(1.0,)))
    figures = ladder_figures(one)
    assert list(figures) == ["curves_auc", "costs_auc", "curves_accuracy", "costs_accuracy"]
    rows = rows_figure(one, "auc")
    encode_png(rows)
    labels = [tick.get_text() for tick in rows.axes[0].get_yticklabels()]
    assert labels == list(NAMES)
    texts = [text.get_text() for text in rows.axes[0].texts]
    assert texts[0] == "undefined" and texts[4] == "0.9800 (0.9600 to 1.0000)"
    encode_png(figures["costs_auc"])
    assert {note.get_text() for note in figures["costs_auc"].axes[0].texts} == set(NAMES[1:])


@given(heights=st.lists(st.floats(0, 1), min_size=1, max_size=12), apart=st.floats(0.01, 1 / 13))
@settings(max_examples=200)
def test_names_are_spread_apart_in_their_order_within_the_panel(heights, apart):
    moved = _spread(heights, apart)
    order = np.argsort(heights, kind="stable")
    places = np.array(moved)[order]
    assert (np.diff(places) >= apart - 1e-6).all()
    assert places[0] >= -1e-6 and places[-1] <= 1 + 1e-6


def test_names_that_are_apart_stay():
    assert _spread([0.9, 0.1, 0.5], 0.1) == pytest.approx([0.9, 0.1, 0.5])
    assert _spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert _spread([1.0, 1.0, 0.0], 0.2) == pytest.approx([0.8, 1.0, 0.0])


def test_names_from_outside_are_neither_columns_nor_files():
    odd = ladder(metric="mae/a|../b")
    table = ladder_table(odd).splitlines()
    head = next(line for line in table if line.startswith("| strategy"))
    assert "MAE: a\\|../b (95 % CI)" in head
    assert list(ladder_figures(odd))[:2] == ["curves_mae_0", "costs_mae_0"]


def test_percent():
    assert [percent(f) for f in (0.07, 0.1, 0.025, 1.0)] == ["7", "10", "2.5", "100"]
