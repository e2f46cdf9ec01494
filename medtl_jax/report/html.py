"""The report of a run: one HTML file that needs nothing beside it.

Style sheet and pictures are inside; there is no script and no link, and a content security
policy forbids both, since class names and ids come from other people's folders. It reads on
a phone and prints.
"""

import base64
import html
import json
import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure

from medtl_jax.files import write_file
from medtl_jax.metrics.scores import CLASS_METRICS
from medtl_jax.report.figures import DPI, encode_png
from medtl_jax.report.tables import (
    LABELS,
    by_class,
    format_interval,
    format_value,
    metric_rows,
    overall,
    printable,
)

# PNG bytes of all pictures together; base64 adds a third, the file stays below 2 MB.
PICTURE_BYTES = 1_300_000
LEAST_DPI = 40
CAPTIONS = {
    "metrics": "Overall metrics with 95 % intervals.",
    "curves": "Training curves; the dotted line marks the epoch whose weights were kept.",
    "confusion": "Confusion matrix: counts, and the share of each true class.",
    "roc": "ROC curves, each class against the rest.",
    "examples": "Examples: the most confident right ones, then the worst errors (dashed frame).",
}
STYLE = """
:root { color: #1c2530; background: #fff; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  max-width: 1000px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 2px solid #0072b2; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p, li { overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.2rem, 1fr)); gap: .6rem; }
.card { border: 1px solid #d5dce4; border-radius: 6px; padding: .5rem .7rem; background: #f7f9fb; }
.card b { display: block; font-size: 1.5rem; line-height: 1.3; }
.card span, .small { display: block; font-size: .8rem; color: #51606f; }
.box { overflow-x: auto; margin: .6rem 0; }
ul { padding-left: 1.2rem; }
table { border-collapse: collapse; font-size: .88rem; min-width: 50%; }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #e3e8ee;
  vertical-align: top; }
th { background: #f0f4f8; white-space: nowrap; }
td.num, th.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.key { white-space: nowrap; color: #51606f; }
td.text { overflow-wrap: anywhere; min-width: 13rem; }
.fixed { white-space: nowrap; }
pre { background: #f4f6f8; padding: .6rem; overflow-x: auto; font-size: .82rem; }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 1rem 0; break-inside: avoid; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #51606f; }
details { margin: .8rem 0; }
summary { cursor: pointer; }
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  pre { white-space: pre-wrap; }
}
"""


def write_report(
    path: pathlib.Path | str,
    *,
    title: str,
    command: str,
    config: dict,
    environment: dict,
    data: dict,
    history: Sequence[dict],
    metrics: dict[str, dict],
    figures: dict[str, Figure],
    notes: Sequence[str],
) -> None:
    """Writes the report of a run to `path`, whole or not at all; equal inputs, equal bytes.

    Args:
      path: the HTML file; its folder is made where missing.
      title: headline.
      command: the command line that repeats the run.
      config: resolved configuration; `seed` is shown by itself.
      environment: versions and devices, shown as they are; of these `commit`, `weights`
        (`{"name", "sha256", "report"}`) and `data_sha256` have a place of their own.
      data: `{"name", "task", "classes", "counts": {split: {class: n}}, "patients":
        {split: n} or None, "image_size", "channels", "licence", "source", "notes",
        "sha256"}`.
      history: one record an epoch; empty for a run that trains nothing.
      metrics: `{split: {metric: {"value", "ci95", "n", ...}}}`; the headline is `test`, or
        the last split where there is no `test`.
      figures: by name; those of `CAPTIONS` stand in their section, others at the end.
      notes: lines for the top of the report.

    Raises:
      UserError: the file cannot be written (disk full, no permission).
    """
    pictures = _pictures(figures)
    sections = [
        _headline(metrics, notes),
        _section("How to reproduce", _reproduce(command, config, environment, data)),
        _section("Data", _data_card(data)),
        _section("Training", _training(history, pictures.get("curves", ""))),
        _section("Metrics", pictures.get("metrics", "") + _metrics(metrics)),
        *(
            _section(heading, pictures[name])
            for heading, name in (
                ("Confusion matrix", "confusion"),
                ("ROC curves", "roc"),
                ("Examples", "examples"),
            )
            if name in pictures
        ),
        *(_section(name, picture) for name, picture in pictures.items() if name not in CAPTIONS),
        _section("Weights", _weights(environment.get("weights"))),
        _section("Configuration", _details("all settings", _json(config))),
        _section("Environment", _environment(environment)),
    ]
    write_file(pathlib.Path(path), _page(title, "\n".join(sections)))


def _page(title: str, body: str) -> str:
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{_text(title)}</h1>
{body}
</body>
</html>
"""


def _headline(metrics: dict[str, dict], notes: Sequence[str]) -> str:
    if not metrics:
        return _list(notes) + "<p>No split was scored in this run.</p>"
    split = "test" if "test" in metrics else list(metrics)[-1]
    entries = overall(metrics[split])
    cards = "".join(
        f'<div class="card"><span>{_text(LABELS.get(name, name))}</span>'
        f"<b>{_text(format_value(entry))}</b>{_small(entry)}</div>"
        for name, entry in entries.items()
    )
    first = next(iter(entries.values()), {"n": 0})
    basis = f"{first['n']} images"
    if "n_patients" in first:
        basis += f" of {first['n_patients']} patients; intervals resample whole patients"
    return (
        _list(notes)
        + f'<h2>Results on the {_text(split)} split</h2><div class="cards">{cards}</div>'
        + f'<p class="small">{_text(basis)}. Averages over classes are macro averages; '
        + "intervals are 95 % bootstrap percentiles.</p>"
    )


def _small(entry: dict) -> str:
    """The line under a value: its interval, or why there is none."""
    if interval := format_interval(entry):
        return f'<span class="small fixed">{_text(interval)}</span>'
    return f'<span class="small">{_text(entry.get("reason", ""))}</span>'


def _reproduce(command: str, config: dict, environment: dict, data: dict) -> str:
    weights = environment.get("weights") or {}
    facts = {
        "seed": config.get("seed"),
        "commit": environment.get("commit"),
        "weights": weights.get("name"),
        "weights sha256": weights.get("sha256"),
        "data": data["name"],
        "data sha256": data.get("sha256") or environment.get("data_sha256"),
    }
    return f'<pre class="command">{_text(command)}</pre>' + _facts(facts)


def _data_card(data: dict) -> str:
    counts, patients = data["counts"], data["patients"]
    rows = [
        # Figures write #<index> for a name that their font cannot draw.
        [f"#{i} {printable(name)}", *(numbers.get(name, 0) for numbers in counts.values())]
        for i, name in enumerate(data["classes"])
    ]
    rows.append(["images", *(sum(numbers.values()) for numbers in counts.values())])
    if patients:
        rows.append(["patients", *(patients.get(split, "not known") for split in counts)])
    facts = {
        "task": data["task"],
        "image size": data["image_size"],
        "channels": data["channels"],
        "licence": data["licence"],
        "source": data["source"],
    }
    if not patients:
        facts["patients"] = "not known: two images of one patient may be in different splits"
    return _table(["class", *counts], rows, numbers=True) + _facts(facts) + _list(data["notes"])


def _training(history: Sequence[dict], picture: str) -> str:
    if not history:
        return "<p>This run trained nothing.</p>"
    keys = list(dict.fromkeys(key for record in history for key in record))
    rows = [[_number(record.get(key)) for key in keys] for record in history]
    heads = [key.replace("_", " ") for key in keys]
    return picture + _details("every epoch", _table(heads, rows, numbers=True))


def _metrics(metrics: dict[str, dict]) -> str:
    parts = []
    for split, entries in metrics.items():
        parts.append(f"<h3>{_text(split)}: overall</h3>{_overall_table(entries)}")
        if classes := by_class(entries):
            parts.append(f"<h3>{_text(split)}: by class</h3>{_class_table(classes)}")
    intervals = [e.get("ci95") for entries in metrics.values() for e in entries.values()]
    if any(interval and interval[0] == interval[1] for interval in intervals):
        parts.append(
            '<p class="small">An interval of no width means that no resample differed (there '
            "was no error to draw), not that the value is certain.</p>"
        )
    return "".join(parts)


def _overall_table(entries: dict[str, dict]) -> str:
    body = "".join(
        f"<tr><td>{_text(LABELS.get(row.name, row.name))}</td>"
        f'<td>{_text(row.value)}</td><td class="fixed">{_text(row.interval)}</td>'
        f'<td>{_text(row.n)}</td><td class="text">{_text(row.note)}</td></tr>'
        for row in metric_rows(overall(entries))
    )
    head = "".join(f"<th>{name}</th>" for name in ("metric", "value", "95 % interval", "n", ""))
    return f'<div class="box"><table><tr>{head}</tr>{body}</table></div>'


def _class_table(classes: dict[str, dict[str, dict]]) -> str:
    present = {metric for entries in classes.values() for metric in entries}
    columns = [metric for metric in CLASS_METRICS if metric in present]
    columns += sorted(present - set(columns))
    head = "".join(f"<th>{_text(LABELS.get(name, name))}</th>" for name in columns)
    body = ""
    for label, entries in classes.items():
        cells = "".join(
            f"<td>{_text(format_value(entries[name]))}{_small(entries[name])}</td>"
            if name in entries
            else "<td></td>"
            for name in columns
        )
        body += f"<tr><td>{_text(label)}</td>{cells}</tr>"
    return f'<div class="box"><table><tr><th>class</th>{head}</tr>{body}</table></div>'


def _weights(weights: dict | None) -> str:
    if not weights:
        return "<p>No pretrained weights were loaded.</p>"
    rest = {key: value for key, value in weights.items() if key != "report"}
    report = weights.get("report")
    return _facts(rest) + (_details("loading report", _any(report)) if report else "")


def _environment(environment: dict) -> str:
    shown = {key: value for key, value in environment.items() if key != "weights"}
    return _facts(shown)


def _pictures(figures: dict[str, Figure]) -> dict[str, str]:
    """Every figure as an HTML element; noisy photographs get fewer dots to stay within bounds."""
    dots = dict.fromkeys(figures, DPI)
    encoded = {name: encode_png(figure) for name, figure in figures.items()}
    while sum(map(len, encoded.values())) > PICTURE_BYTES:
        largest = max(encoded, key=lambda name: len(encoded[name]))
        if dots[largest] <= LEAST_DPI:
            break
        dots[largest] = max(LEAST_DPI, dots[largest] * 4 // 5)
        encoded[largest] = encode_png(figures[largest], dots[largest])
    return {name: _picture(CAPTIONS.get(name, name), png) for name, png in encoded.items()}


def _picture(caption: str, png: bytes) -> str:
    content = base64.b64encode(png).decode()
    return (
        f'<figure><div class="box"><img alt="{_text(caption)}" '
        f'src="data:image/png;base64,{content}"></div>'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _section(heading: str, body: str) -> str:
    return f"<h2>{_text(heading)}</h2>\n{body}"


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{body}</details>"


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>" if lines else ""


def _table(head: Sequence, rows: Sequence[Sequence], numbers: bool = False) -> str:
    """A table whose columns after the first are right-aligned where they are `numbers`."""
    kinds = ["", *[' class="num"' if numbers else ""] * (len(head) - 1)]
    top = "".join(f"<th{k}>{_text(cell)}</th>" for k, cell in zip(kinds, head, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{k}>{_text(c)}</td>' for k, c in zip(kinds, row, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="box"><table><tr>{top}</tr>{body}</table></div>'


def _facts(facts: dict) -> str:
    rows = "".join(
        f'<tr><td class="key">{_text(key)}</td><td class="text">{_any(value)}</td></tr>'
        for key, value in facts.items()
    )
    return f'<div class="box"><table>{rows}</table></div>'


def _any(value: object) -> str:
    """A value of unknown shape: text as lines, a list as lines, a dict as JSON."""
    if value is None or value == "":
        return "not recorded"
    if isinstance(value, dict):
        return _json(value)
    if isinstance(value, list | tuple):
        return "<br>".join(_text(line) for line in value)
    lines = str(value).splitlines()
    if len(lines) > 1:
        return f"<pre>{chr(10).join(_text(line) for line in lines)}</pre>"
    return _text(value)


def _json(value: dict) -> str:
    lines = json.dumps(value, indent=2, default=str, ensure_ascii=False).splitlines()
    return f"<pre>{chr(10).join(_text(line) for line in lines)}</pre>"


def _number(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _text(value: object) -> str:
    return html.escape(printable(value))
