"""Metrics as rows: for the terminal as plain text, and for the report page.

`metrics` is one split's `{metric: {"value", "ci95", "n", ...}}` as
`metrics.uncertainty.score_with_intervals` returns it and `metrics.json` stores it. A metric is
named `metric`, `metric/class`, and where it depends on a threshold `metric@point` or
`metric@point/class`.
Text that came from outside (class names, ids, paths) goes through `printable`.
"""

import dataclasses
from collections.abc import Sequence

# Names for readers of figures and the report; the terminal shows the keys as they are.
LABELS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auc": "AUC",
    "auc_frequent": "AUC, frequent findings",
    "pr_auc": "PR-AUC",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall (sensitivity)",
    "specificity": "specificity",
    "npv": "negative predictive value",
    "mcc": "MCC",
    "kappa": "Cohen's kappa",
    "quadratic_kappa": "quadratic kappa",
    "exact_match": "exact match",
    "ece": "calibration error (ECE)",
    "brier": "Brier score",
    "nll": "negative log-likelihood",
    "dice": "Dice",
    "iou": "IoU",
    "dice_pooled": "Dice, pooled pixels",
    "iou_pooled": "IoU, pooled pixels",
    "hd95": "HD95 (pixels)",
    "nsd": "normalised surface distance",
    "mae": "MAE",
    "mse": "MSE",
    "rmse": "RMSE",
    "median_error": "median absolute error",
    "bias": "bias (mean error)",
    "r2": "R²",
    "pearson": "Pearson's r",
}
# Metrics whose best value is 1: they share an axis.
BOUNDED = frozenset((
    "accuracy", "balanced_accuracy", "auc", "auc_frequent", "pr_auc", "f1", "precision", "recall",
    "specificity", "mcc", "kappa", "quadratic_kappa", "exact_match", "dice", "iou", "dice_pooled",
    "iou_pooled", "nsd", "r2", "pearson",
))  # fmt: skip
# What stands at the top of a report.
HEADLINE = {
    "classify": ("accuracy", "auc", "f1", "recall", "specificity", "ece"),
    "ordinal": ("quadratic_kappa", "accuracy", "mae", "auc", "ece"),
    "multilabel": ("auc", "auc_frequent", "pr_auc", "f1", "recall", "specificity", "ece"),
    "segment": ("dice", "iou", "dice_pooled", "hd95", "nsd"),
    "regress": ("mae", "rmse", "r2", "pearson"),
}
_CALIBRATED = "_calibrated"
BY_PATIENT, OBSERVER = "_patient", "_observer2"
# In a run that is adapted to a target, whose test is `test`: the test of the source.
SOURCE_TEST = "source_test"
# Columns of the terminal's table by class: the first of these that there are.
_CLASS_COLUMNS = (
    "dice", "iou", "hd95", "nsd", "mae", "rmse", "r2", "pearson", "auc", "pr_auc", "recall",
    "specificity", "f1",
)  # fmt: skip
_MOST_COLUMNS = 5


@dataclasses.dataclass(frozen=True)
class Row:
    """One metric, formatted: empty `interval` where there is none, `note` says why.

    `delong` is the interval of an AUC by DeLong's method, empty for every other metric.
    """

    name: str
    value: str
    interval: str
    n: str
    note: str
    delong: str = ""


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """What a threshold chosen on validation does on one split.

    Attributes:
      point: how it was chosen, `youden` or `sensitivity`.
      label: the class or finding, empty where there is one only.
      threshold: None where it was not recorded.
      entries: `{metric: entry}` at this threshold.
    """

    point: str
    label: str
    threshold: float | None
    entries: dict[str, dict]


def printable(text: object) -> str:
    """Returns `str(text)` on one line, every character that is not printable as an escape.

    A folder's name may hold terminal escapes, line breaks, bidirectional marks or bytes
    that are no text; as `\\x1b` they are visible and harmless.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def label_of(metric: str) -> str:
    """Returns a metric's name for readers; `_micro`, `_calibrated` become words.

    Of `metric/class` it is the metric's, a colon, and the class.
    """
    metric, slash, name = metric.partition("/")
    if slash:
        return f"{label_of(metric)}: {printable(name)}"
    for suffix, words in (("_micro", ", micro average"), (_CALIBRATED, ", calibrated")):
        if metric.endswith(suffix):
            return label_of(metric.removesuffix(suffix)) + words
    return LABELS.get(metric, printable(metric))


def main_split(metrics: dict[str, dict]) -> str:
    """Returns the split to show first: `test`, or the last one that is not by patient."""
    if "test" in metrics:
        return "test"
    return next(split for split in reversed(metrics) if not split.endswith((BY_PATIENT, OBSERVER)))


def split_label(split: str) -> str:
    """Returns a split's name for readers: `test_patient` is the test split by patient."""
    for suffix, what in ((BY_PATIENT, "averaged by patient"), (OBSERVER, "second observer")):
        if split.endswith(suffix):
            return f"{split_label(split.removesuffix(suffix))}, {what}"
    return "source's own test" if split == SOURCE_TEST else printable(split)


def metric_rows(metrics: dict[str, dict]) -> list[Row]:
    """Returns a row for each metric, in the order of `metrics`."""
    return [
        Row(
            printable(name),
            format_value(entry),
            format_interval(entry),
            str(entry["n"]),
            printable(entry.get("reason", "")),
            format_interval(entry, "delong95"),
        )
        for name, entry in metrics.items()
    ]


def overall(metrics: dict[str, dict]) -> dict[str, dict]:
    """Returns the metrics over all classes, without those at a threshold."""
    return {name: entry for name, entry in metrics.items() if "/" not in name and "@" not in name}


def uncalibrated(metrics: dict[str, dict]) -> dict[str, dict]:
    """Returns the metrics without those after temperature scaling."""
    return {
        name: entry
        for name, entry in metrics.items()
        if not name.partition("/")[0].endswith(_CALIBRATED)
    }


def by_class(metrics: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """Returns `{class: {metric: entry}}` of the metrics named `metric/class`.

    Those at a threshold are left out, see `operating_points`. Empty for one class alone, whose
    metrics are the overall ones.
    """
    result: dict[str, dict[str, dict]] = {}
    for name, entry in metrics.items():
        metric, slash, label = name.partition("/")
        if slash and "@" not in metric:
            result.setdefault(label, {})[metric] = entry
    return result if len(result) > 1 else {}


def before_and_after(metrics: dict[str, dict]) -> dict[str, tuple[dict, dict]]:
    """Returns `{metric: (entry, entry after temperature scaling)}`, overall and by class."""
    pairs = {}
    for name, after in metrics.items():
        metric, slash, label = name.partition("/")
        plain = metric.removesuffix(_CALIBRATED) + slash + label
        if metric.endswith(_CALIBRATED) and plain in metrics:
            pairs[plain] = (metrics[plain], after)
    return pairs


def operating_points(metrics: dict[str, dict], thresholds: dict) -> list[OperatingPoint]:
    """Returns what `metrics` say at each threshold, in the order of `metrics`.

    Args:
      metrics: of one split; those named `metric@point` and `metric@point/class` count.
      thresholds: `{class: {point: threshold}}`, chosen on validation.
    """
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for name, entry in metrics.items():
        # A class may have an @ in its name.
        whole, _, label = name.partition("/")
        metric, at, point = whole.partition("@")
        if at:
            found.setdefault((label, point), {})[metric] = entry
    only = next(iter(thresholds)) if len(thresholds) == 1 else ""
    return [
        OperatingPoint(point, label, thresholds.get(label or only, {}).get(point), entries)
        for (label, point), entries in found.items()
    ]


def format_value(entry: dict) -> str:
    """Returns the value with digits that suit its size and its interval's, or `undefined`."""
    if entry["value"] is None:
        return "undefined"
    return _number(entry["value"], entry)


def format_interval(entry: dict, key: str = "ci95") -> str:
    """Returns the 95 % interval as `low to high`, or an empty string where there is none."""
    interval = entry.get(key)
    if interval is None:
        return ""
    return f"{_number(interval[0], entry)} to {_number(interval[1], entry)}"


def _number(value: float, entry: dict) -> str:
    """A value or an end of its interval: four decimals, fewer above 10, powers of ten far off."""
    largest = max(abs(v) for v in (entry["value"], *(entry.get("ci95") or ())) if v is not None)
    if largest and not 1e-3 <= largest < 1e7:
        return f"{value:.3e}"
    return f"{value:.{4 if largest < 10 else 2 if largest < 1000 else 1}f}"


def metrics_table(metrics: dict[str, dict]) -> str:
    """Returns the metrics of one split as aligned plain text for the terminal.

    One line an overall metric: name, value, 95 % interval, number of images, and the reason
    where a value or an interval is undefined. Then one line a class with its main metrics;
    all of them, with intervals, are in `metrics.json`. A last line says so where patients were
    resampled.
    """
    whole = {name: entry for name, entry in metrics.items() if "/" not in name}
    rows = [
        (row.name, row.value, row.interval, row.n, row.note)
        for row in (Row("metric", "value", "95% CI", "n", ""), *metric_rows(whole))
    ]
    lines = aligned(rows, "<><><")
    if classes := by_class(metrics):
        present = {metric for entries in classes.values() for metric in entries}
        names = [name for name in _CLASS_COLUMNS if name in present][:_MOST_COLUMNS]
        names = names or sorted(present)[:_MOST_COLUMNS]
        table = [("class", *names)]
        for label, entries in classes.items():
            cells = (format_value(entries[name]) if name in entries else "" for name in names)
            table.append((printable(label), *cells))
        lines += ["", *aligned(table, "<" + ">" * len(names))]
    patients = next((e["n_patients"] for e in metrics.values() if "n_patients" in e), None)
    if patients is not None:
        lines.append(f"Intervals resample whole patients ({patients}).")
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Returns lines of columns two spaces apart, each to the left (`<`) or right (`>`)."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
