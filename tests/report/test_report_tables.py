import re

import pytest

from medtl_jax.report.tables import (
    before_and_after,
    by_class,
    format_interval,
    format_value,
    label_of,
    main_split,
    metric_rows,
    metrics_table,
    operating_points,
    overall,
    printable,
    split_label,
)


def entry(value, interval=None, **more):
    return {"value": value, "ci95": interval, "n": 10, **more}


def test_terminal_table():
    metrics = {
        "accuracy": {"value": 0.92154, "ci95": [0.9, 0.94], "n": 624},
        "auc": {"value": None, "ci95": None, "n": 624, "reason": "no image"},
        "auc/\x1b[2J": {"value": None, "ci95": None, "n": 624, "reason": "no image"},
        "recall/\x1b[2J": {"value": 0.5, "ci95": [0.25, 0.75], "n": 624},
        "auc/yes": {"value": 0.875, "ci95": None, "n": 624},
    }
    assert metrics_table(metrics).splitlines() == [
        "metric        value  95% CI              n",
        "accuracy     0.9215  0.9000 to 0.9400  624",
        "auc       undefined                    624  no image",
        "",
        "class          auc  recall",
        "\\x1b[2J  undefined  0.5000",
        "yes         0.8750",
    ]
    clustered = {"accuracy": {"value": 1.0, "ci95": None, "n": 9, "n_patients": 3}}
    assert metrics_table(clustered).endswith("\nIntervals resample whole patients (3).")


def test_metrics_at_a_threshold_are_apart_from_the_others():
    metrics = {
        "auc": entry(0.5), "auc/a@b": entry(0.5), "auc/c": entry(0.5),
        "recall@youden/a@b": entry(0.25), "recall@youden/c": entry(0.75),
        "specificity@youden/c": entry(0.5),
    }  # fmt: skip
    assert list(overall(metrics)) == ["auc"]
    assert list(by_class(metrics)) == ["a@b", "c"] and list(by_class(metrics)["c"]) == ["auc"]
    first, second = operating_points(metrics, {"c": {"youden": 0.5}, "a@b": {"youden": None}})
    assert (first.point, first.label, first.threshold) == ("youden", "a@b", None)
    assert (second.point, second.label, second.threshold) == ("youden", "c", 0.5)
    assert list(second.entries) == ["recall", "specificity"]


def test_the_only_question_has_no_name_in_the_metrics():
    (point,) = operating_points({"recall@youden": entry(0.5)}, {"yes": {"youden": 0.375}})
    assert (point.label, point.threshold) == ("", 0.375)


def test_one_class_alone_is_not_repeated():
    assert by_class({"dice": entry(0.5), "dice/lesion": entry(0.5)}) == {}


def test_values_before_and_after_calibration_are_paired():
    metrics = {
        "ece": entry(0.25), "ece/a": entry(0.5), "ece_calibrated": entry(0.125),
        "ece_calibrated/a": entry(0.375), "nll_calibrated": entry(1.0),
    }  # fmt: skip
    pairs = before_and_after(metrics)
    assert {name: (old["value"], new["value"]) for name, (old, new) in pairs.items()} == {
        "ece": (0.25, 0.125),
        "ece/a": (0.5, 0.375),
    }


@pytest.mark.parametrize(
    ("value", "interval", "shown"),
    [
        (0.5, [0.25, 0.75], "0.5000 (0.2500 to 0.7500)"),
        (9.123456, [8.0, 9.5], "9.1235 (8.0000 to 9.5000)"),
        (9.123456, [8.0, 11.0], "9.12 (8.00 to 11.00)"),
        (2345.678, [2000.0, 3000.0], "2345.7 (2000.0 to 3000.0)"),
        (-3.5, [-12.0, 1.0], "-3.50 (-12.00 to 1.00)"),
        (0.00012345, [0.0001, 0.0002], "1.234e-04 (1.000e-04 to 2.000e-04)"),
        (123456789.0, [1e8, 2e8], "1.235e+08 (1.000e+08 to 2.000e+08)"),
        (0.0, [0.0, 0.0], "0.0000 (0.0000 to 0.0000)"),
        (None, None, "undefined ()"),
    ],
)
def test_digits_suit_the_size_of_a_value(value, interval, shown):
    found = entry(value, interval)
    assert f"{format_value(found)} ({format_interval(found)})" == shown


def test_rows_have_delongs_interval():
    (row,) = metric_rows({"auc": entry(0.5, [0.4, 0.6], delong95=[0.375, 0.625])})
    assert (row.interval, row.delong) == ("0.4000 to 0.6000", "0.3750 to 0.6250")
    (row,) = metric_rows({"auc": entry(1.0, [1.0, 1.0], delong95=None)})
    assert row.delong == ""


def test_names_for_readers():
    assert label_of("recall_micro") == "recall (sensitivity), micro average"
    assert label_of("ece_calibrated") == "calibration error (ECE), calibrated"
    assert label_of("own\x1b") == "own\\x1b"
    assert split_label("test_patient") == "test, averaged by patient"
    assert split_label("source_test") == "source's own test"
    assert split_label("source_test_patient") == "source's own test, averaged by patient"
    assert main_split({"val": {}, "source_test": {}, "test": {}}) == "test"
    assert main_split({"val": {}, "source_test": {}, "source_test_patient": {}}) == "source_test"
    assert main_split({"val": {}, "val_patient": {}}) == "val"
    assert main_split({"val": {}, "test": {}, "test_patient": {}}) == "test"


def test_printable_keeps_letters_and_escapes_the_rest():
    assert printable("Grün 肝 1") == "Grün 肝 1"
    assert printable("a\n\u202eb\udcff") == "a\\n\\u202eb\\udcff"
    assert re.fullmatch(r"[ -~]*", printable("\x00\x07\x9b"))
