"""Metrics as rows: for the terminal as plain text, and for the report page.

`metrics` is one split's `{metric: {"value", "ci95", "n", ...}}` as
`metrics.uncertainty.score_with_intervals` returns it and `metrics.json` stores it.
Text that came from outside (class names, ids, paths) goes through `printable`.
"""

import dataclasses

# Names for readers of figures and the report; the terminal shows the keys as they are.
LABELS = {
    "accuracy": "accuracy",
    "auc": "AUC",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall (sensitivity)",
    "specificity": "specificity",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One metric, formatted: empty `interval` where there is none, `note` says why."""

    name: str
    value: str
    interval: str
    n: str
    note: str


def printable(text: object) -> str:
    """Returns `str(text)` on one line, every character that is not printable as an escape.

    A folder's name may hold terminal escapes, line breaks, bidirectional marks or bytes
    that are no text; as `\\x1b` they are visible and harmless.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def metric_rows(metrics: dict[str, dict]) -> list[Row]:
    """Returns a row for each metric, in the order of `metrics`."""
    return [
        Row(
            printable(name),
            format_value(entry),
            format_interval(entry),
            str(entry["n"]),
            printable(entry.get("reason", "")),
        )
        for name, entry in metrics.items()
    ]


def overall(metrics: dict[str, dict]) -> dict[str, dict]:
    """Returns the metrics over all classes: those without a class in the name."""
    return {name: entry for name, entry in metrics.items() if "/" not in name}


def by_class(metrics: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """Returns `{class: {metric: entry}}` of the metrics named `metric/class`."""
    result: dict[str, dict[str, dict]] = {}
    for name, entry in metrics.items():
        metric, slash, label = name.partition("/")
        if slash:
            result.setdefault(label, {})[metric] = entry
    return result


def format_value(entry: dict) -> str:
    """Returns the value with four digits, or `undefined`."""
    return "undefined" if entry["value"] is None else f"{entry['value']:.4f}"


def format_interval(entry: dict) -> str:
    """Returns the 95 % interval as `low to high`, or an empty string where there is none."""
    interval = entry.get("ci95")
    return "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def metrics_table(metrics: dict[str, dict]) -> str:
    """Returns the metrics of one split as aligned plain text for the terminal.

    One line a metric: name, value, 95 % interval, number of images, and the reason where
    a value or an interval is undefined. A last line says so where patients were resampled.
    """
    head = Row("metric", "value", "95% CI", "n", "")
    rows = [head, *metric_rows(metrics)]
    name, value, interval, n = (
        max(len(getattr(row, field)) for row in rows)
        for field in ("name", "value", "interval", "n")
    )
    lines = [
        f"{row.name:<{name}}  {row.value:>{value}}  {row.interval:<{interval}}  {row.n:>{n}}"
        f"  {row.note}".rstrip()
        for row in rows
    ]
    patients = next((e["n_patients"] for e in metrics.values() if "n_patients" in e), None)
    if patients is not None:
        lines.append(f"Intervals resample whole patients ({patients}).")
    return "\n".join(lines)
