"""The parts of a report that hold numbers: headline, metrics, calibration, operating points."""

from collections.abc import Sequence

from medtl_jax.report.markup import (
    bullets,
    details,
    facts,
    note,
    rich_table,
    section,
    subsection,
    text,
)
from medtl_jax.report.tables import (
    BY_PATIENT,
    HEADLINE,
    before_and_after,
    by_class,
    format_interval,
    format_value,
    label_of,
    main_split,
    metric_rows,
    operating_points,
    overall,
    split_label,
    uncalibrated,
)

# Columns of a table by class: more would not fit on paper.
_COLUMNS = 5
_NOUNS = {"multilabel": "finding", "regress": "target"}
# The headline of each of several targets.
_OF_TARGETS = ("mae", "r2")
_POINTS = {"youden": "Youden", "sensitivity": "target sensitivity"}
_POINT_COLUMNS = ("recall", "specificity", "precision", "npv")


def headline(task: str, metrics: dict[str, dict], notes: Sequence[str]) -> str:
    """Returns notes and the main metrics of the main split as cards."""
    if not metrics:
        return bullets(notes) + "<p>No split was scored in this run.</p>"
    split = main_split(metrics)
    entries = overall(uncalibrated(metrics[split]))
    entries = {name: entries[name] for name in HEADLINE[task] if name in entries} or entries
    if task == "regress" and (targets := by_class(metrics[split])):
        # A mean over years and square millimetres says nothing.
        entries = {
            f"{name}/{label}": found[name]
            for label, found in targets.items()
            for name in _OF_TARGETS
            if name in found
        }
    cards = "".join(
        f'<div class="card"><span>{text(label_of(name))}</span>'
        f"<b>{text(format_value(entry))}</b>{_small(entry)}</div>"
        for name, entry in entries.items()
    )
    first = next(iter(entries.values()), {"n": 0})
    basis = f"{first['n']} images"
    if "n_patients" in first:
        basis += f" of {first['n_patients']} patients; intervals resample whole patients"
    basis += ". Intervals are 95 % bootstrap intervals."
    if by_class(metrics[split]):
        basis += f" Averages over the {_NOUNS.get(task, 'classe')}s are macro averages."
    body = f'<div class="cards">{cards}</div>' + note(basis)
    return bullets(notes) + section(f"Results on the {split} split", body)


def metrics_part(task: str, metrics: dict[str, dict]) -> str:
    """Returns a table of the overall metrics and one by class of every split.

    The main split comes first, as images and by patient; the others are folded.
    """
    if not metrics:
        return ""
    main, noun = main_split(metrics), _NOUNS.get(task, "class")
    parts, folded = [], []
    for split in sorted(metrics, key=lambda split: not split.startswith(main)):
        name, entries = split_label(split), uncalibrated(metrics[split])
        made = subsection(f"{name}: overall", _overall_table(entries))
        if classes := by_class(entries):
            made += subsection(f"{name}: by {noun}", _class_tables(classes, noun))
        if split.startswith(main):
            parts.append(made)
        else:
            folded.append(details(name, made))
    parts += folded
    whole = [entry for entries in metrics.values() for entry in entries.values()]
    if any(entry.get("delong95") for entry in whole):
        parts.append(note("DeLong: the AUC's interval by DeLong's method instead of resampling."))
    return "".join(parts)


def calibration_part(metrics: dict[str, dict], calibration: dict | None, picture: str) -> str:
    """Returns temperatures, and calibration before and after; empty where there is nothing.

    It is that of the main split, as images and by patient; `metrics` are of all splits.
    """
    pairs = {
        label_of(name) + words: (name, *pair)
        for words, entries in _main_parts(metrics)
        for name, pair in before_and_after(entries).items()
    }
    if not (pairs or picture):
        return ""
    parts = [picture]
    if calibration is not None:
        parts.append(facts(_temperatures(calibration)))
    head = ("", "before scaling", "after scaling")
    for inside in (False, True):
        rows = [
            (label, (_cell(before), _cell(after)))
            for label, (name, before, after) in pairs.items()
            if ("/" in name) == inside
        ]
        if rows:
            made = rich_table(head, rows)
            parts.append(details("by class", made) if inside else made)
    return "".join(parts)


def _main_parts(metrics: dict[str, dict]) -> list[tuple[str, dict]]:
    """What is added to a name, and the metrics: of the main split as images, and by patient."""
    if not metrics:
        return []
    main = main_split(metrics)
    parts = [("", metrics[main]), (", by patient", metrics.get(main + BY_PATIENT, {}))]
    return [(words, entries) for words, entries in parts if entries]


def _temperatures(calibration: dict) -> dict[str, str]:
    """Temperatures by name: one, or one a finding, with the reason where it was not fitted."""
    names = ["temperature"]
    if len(calibration["temperature"]) > 1:
        names = [f"temperature/{label}" for label in calibration["thresholds"]]
    reasons = calibration.get("reasons", {})
    known = {"fitted on": calibration["fitted_on"]}
    for name, value in zip(names, calibration["temperature"], strict=True):
        reason = f" ({reasons[name]})" if name in reasons else ""
        known[name.replace("/", " of ", 1)] = f"{value:.4g}{reason}"
    return known


def thresholds_part(metrics: dict[str, dict], calibration: dict | None) -> str:
    """Returns the table of operating points of the main split; empty where there are none.

    Those for patients, whose scores are means over their images, have thresholds of their own.
    """
    points = []
    for words, entries in _main_parts(metrics):
        key = "patient_thresholds" if words else "thresholds"
        thresholds = calibration.get(key, {}) if calibration else {}
        points += [(words, point) for point in operating_points(entries, thresholds)]
    if not points:
        return ""
    present = {metric for _, point in points for metric in point.entries}
    columns = [name for name in _POINT_COLUMNS if name in present]
    rows = []
    for words, point in points:
        value = "not defined" if point.threshold is None else f"{point.threshold:.4f}"
        cells = [_cell(point.entries[name]) if name in point.entries else "" for name in columns]
        label = f"{point.label}: " if point.label else ""
        label += _POINTS.get(point.point, point.point) + words
        rows.append((label, (text(value), *cells)))
    head = ("operating point", "threshold", *(label_of(name) for name in columns))
    words = "Thresholds were chosen on the validation split and not changed afterwards."
    if calibration and "target_sensitivity" in calibration:
        words += (
            f" Youden: the largest sensitivity + specificity; target sensitivity: the highest "
            f"threshold that reached {calibration['target_sensitivity']:g} on validation."
        )
    return note(words) + rich_table(head, rows)


def _overall_table(entries: dict[str, dict]) -> str:
    rows = []
    for row in metric_rows(overall(entries)):
        interval = f'<span class="fixed">{text(row.interval)}</span>{_delong(row.delong)}'
        reason = f'<span class="small">{text(row.note)}</span>' if row.note else ""
        rows.append((label_of(row.name), (text(row.value), interval + reason, text(row.n))))
    return rich_table(("metric", "value", "95 % interval", "n"), rows)


def _class_tables(classes: dict[str, dict[str, dict]], noun: str) -> str:
    """Tables of at most `_COLUMNS` metrics side by side, a row a class."""
    names = list(dict.fromkeys(metric for entries in classes.values() for metric in entries))
    count = -(-len(names) // _COLUMNS)
    width = -(-len(names) // count)
    parts = []
    for start in range(0, len(names), width):
        columns = names[start : start + width]
        rows = [
            (label, [_cell(entries[name]) if name in entries else "" for name in columns])
            for label, entries in classes.items()
        ]
        parts.append(rich_table((noun, *(label_of(name) for name in columns)), rows))
    return "".join(parts)


def _cell(entry: dict) -> str:
    return text(format_value(entry)) + _small(entry)


def _small(entry: dict) -> str:
    """The lines under a value: its interval, or why there is none, and DeLong's."""
    delong = _delong(format_interval(entry, "delong95"))
    if interval := format_interval(entry):
        return f'<span class="small fixed">{text(interval)}</span>{delong}'
    return f'<span class="small">{text(entry.get("reason", ""))}</span>{delong}'


def _delong(interval: str) -> str:
    return f'<span class="small">DeLong {text(interval)}</span>' if interval else ""
