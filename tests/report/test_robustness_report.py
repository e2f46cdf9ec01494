"""Test-time augmentation and corrupted images in the report: numbers, gaps, and foreign names."""

import re

import pytest
from report_tasks import view
from test_report import Page, given

from medtl_jax.augment.corruptions import NAMES
from medtl_jax.report.html import write_report
from medtl_jax.report.robustness import (
    corruptions_figure,
    corruptions_part,
    corruptions_text,
    shown_metrics,
    tta_part,
    tta_text,
)
from medtl_jax.report.style import WIDTH


def entry(value, half=0.02):
    interval = None if value is None or half is None else [value - half, value + half]
    return {"value": value, "ci95": interval, "n": 90}


def damaged(task="classify", **clean):
    """A card whose values fall by 0.1 times the corruption's place and 0.01 times the severity."""
    return {
        "split": "test",
        "task": task,
        "severities": [1, 2, 3, 4, 5],
        "clean": {name: entry(value) for name, value in clean.items()},
        "corruptions": {
            name: [
                {m: entry(v - 0.1 * place - 0.01 * severity) for m, v in clean.items()}
                for severity in range(1, 6)
            ]
            for place, name in enumerate(NAMES)
        },
    }  # fmt: skip


def change(plain, tta, verdict="", p=None, reason=""):
    difference = None if plain is None else tta - plain
    interval = None if plain is None else [difference - 0.01, difference + 0.01]
    return {
        "plain": plain, "tta": tta, "difference": difference, "ci95": interval, "p": p,
        "p_holm": p, "test": "", "verdict": verdict, "reason": reason,
    }  # fmt: skip


def gain(**changes):
    metrics = {
        "f1": change(0.75, 0.7625),
        "auc": change(0.9, 0.94, "better", 0.00001),
        "accuracy": change(0.8, 0.775, "cannot tell at n = 90 images", 0.5),
        "mcc": change(None, None, "", None, "too few <images>"),
    }
    return {
        "split": "test", "views": 4, "transforms": {"rotate": 10.0, "noise": 0.05},
        "trained": True, "n": 90, "n_patients": 30, "primary": ["auc", "accuracy"],
        "metrics": metrics, **changes,
    }  # fmt: skip


# ---- corrupted images --------------------------------------------------------------------------


def test_lines_and_whiskers_are_the_numbers():
    card = damaged(accuracy=0.9, auc=0.95, f1=0.8)
    figure = corruptions_figure(card)
    assert figure.get_figwidth() <= WIDTH and len(figure.axes) == 2
    for axes, top in zip(figure.axes, (0.9, 0.95), strict=True):
        drawn = {line.get_label(): line for line in axes.lines if line.get_label()[0] != "_"}
        assert [*drawn] == ["clean", *(name.replace("_", " ") for name in NAMES)]
        assert set(drawn.pop("clean").get_ydata()) == {top}
        for place, line in enumerate(drawn.values()):
            wanted = [top - 0.1 * place - 0.01 * severity for severity in range(1, 6)]
            assert line.get_ydata() == pytest.approx(wanted)
            assert [round(x) for x in line.get_xdata()] == [1, 2, 3, 4, 5]
        whiskers = [line for line in axes.lines if line.get_label().startswith("_")]
        assert len(whiskers) == 25
        heights = [max(line.get_ydata()) - min(line.get_ydata()) for line in whiskers]
        assert heights == pytest.approx([0.04] * 25)
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in drawn.values()}
    assert [len(set(look)) for look in zip(*looks, strict=True)] == [5, 4, 5]


def test_what_is_undefined_is_a_gap_and_no_zero():
    card = damaged(dice=0.8, task="segment")
    card["corruptions"]["blur"][2]["dice"] = {"value": None, "ci95": None, "n": 90, "reason": "no"}
    (axes,) = corruptions_figure(card).axes
    blur = next(line for line in axes.lines if line.get_label() == "blur")
    assert [str(value) for value in blur.get_ydata()].count("nan") == 1
    assert "undefined" in corruptions_part(card, "") and "undefined" in corruptions_text(card)


@pytest.mark.parametrize(
    ("task", "clean", "wanted"),
    [
        ("classify", {"f1": 0.8, "auc": 0.9, "accuracy": 0.9}, ["accuracy", "auc"]),
        ("classify", {"accuracy": 0.9, "auc": None}, ["accuracy"]),
        ("ordinal", {"quadratic_kappa": None, "mae": None}, ["quadratic_kappa"]),
        ("segment", {"iou": 0.5, "dice": 0.7}, ["dice"]),
        ("regress", {"mae": 3.0, "rmse": 4.0}, ["mae"]),
        ("regress", {"mae": 3.0, "mae/age": 2.0, "mae/weight": 4.0}, ["mae/age", "mae/weight"]),
    ],
)
def test_the_metrics_that_are_shown(task, clean, wanted):
    card = {"task": task, "clean": {name: entry(value) for name, value in clean.items()}}
    assert shown_metrics(card) == wanted


def test_the_terminal_has_the_first_metric_of_every_corruption():
    lines = corruptions_text(damaged(accuracy=0.9, auc=0.95)).splitlines()
    assert lines[0] == "accuracy by severity of a corruption, test split"
    assert lines[1].split() == ["corruption", "clean", "1", "2", "3", "4", "5"]
    assert [line.split()[0] for line in lines[2:]] == list(NAMES)
    assert lines[3].split()[1:] == ["0.9000", "0.7900", "0.7800", "0.7700", "0.7600", "0.7500"]


def test_tables_have_every_value_with_its_interval():
    part = corruptions_part(damaged(accuracy=0.9, auc=0.95), "<figure>")
    assert part.count("<figure>") == 1
    assert "0.8900" in part and "(0.8700 to 0.9100)" in part
    # Bias field at severity 5: 0.9 - 0.4 - 0.05, 0.95 - 0.4 - 0.05.
    assert "0.4500" in part and "0.5000" in part
    assert "0.4, 0.3, 0.2, 0.1, 0.05" in part and "sigma 1, 2, 3, 4, 6 pixels" in part
    assert corruptions_part(None, "") == ""


# ---- test-time augmentation --------------------------------------------------------------------


def test_verdicts_stand_first_and_the_rest_has_none():
    part = tta_part(gain())
    first, rest = part.split("<details>")
    assert "0.0400" in first and "0.0300 to 0.0500" in first and "▲ better" in first
    assert "&lt; 0.0001" in first and "cannot tell at n = 90 images" in first
    assert "F1" in rest and "0.0125" in rest and "verdict" not in rest
    assert "undefined" in rest and "too few &lt;images&gt;" in rest
    assert "4 views" in first and "3 others" in first and "rotate 10, noise 0.05" in first
    assert "90 images of 30 patients" in first
    assert "one other" in tta_part(gain(views=2, n_patients=None))
    assert "by which the training images were drawn too" in first
    kept = tta_part(gain(trained=False))
    assert "by which no training image was drawn: kept features" in kept and "drawn too" not in kept
    assert tta_part(None) == ""


def test_the_terminal_has_every_difference():
    lines = tta_text(gain()).splitlines()
    assert lines[0] == "test-time augmentation, 4 views, test split"
    assert [line.split()[0] for line in lines[2:]] == ["auc", "accuracy", "f1", "mcc"]
    cells = re.split(r"  +", lines[3])
    assert cells[1:] == [
        "0.8000", "0.7750", "-0.0250", "-0.0350 to -0.0150", "0.5000",
        "cannot tell at n = 90 images",
    ]  # fmt: skip
    assert lines[5].endswith("too few <images>")


def test_both_have_a_section_of_their_own(tmp_path):
    card = damaged(accuracy=0.9, auc=0.95)
    figures = {"corruptions": corruptions_figure(card)}
    parts = given("classify", view("classify"), figures=figures)
    write_report(tmp_path / "report.html", **parts, tta=gain(), corruptions=card)
    page = Page(tmp_path / "report.html")
    assert page.tags.count("img") == 1
    whole = (tmp_path / "report.html").read_text("utf-8")
    headings = re.findall("<h2>([^<]*)</h2>", whole)
    assert headings.index("Test-time augmentation") + 1 == headings.index("Corrupted images")
    assert "corruptions" not in headings
    write_report(tmp_path / "plain.html", **given("classify", view("classify"), figures={}))
    visible = Page(tmp_path / "plain.html").visible
    assert "Test-time augmentation" not in visible and "Corrupted images" not in visible
