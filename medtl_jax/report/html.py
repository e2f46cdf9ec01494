"""The report of a run: one HTML file that needs nothing beside it, see `report.markup`."""

import pathlib
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from medtl_jax.files import write_file
from medtl_jax.report.audit import audit_part
from medtl_jax.report.drift import drift_part
from medtl_jax.report.markup import (
    anything,
    as_json,
    bullets,
    details,
    facts,
    page,
    pictures,
    section,
    side_by_side,
    table,
    text,
)
from medtl_jax.report.results import calibration_part, headline, metrics_part, thresholds_part
from medtl_jax.report.robustness import corruptions_part, tta_part
from medtl_jax.report.tables import printable

# Figures of a section, those that a run has; a name in no section gets one of its own.
_FIGURES = {
    "Masks": ("dice", "overlay_best", "overlay_median", "overlay_worst"),
    "Predicted numbers": ("predicted", "agreement", "residuals"),
    "Confusion matrix": ("confusion",),
    "ROC and precision-recall curves": ("auc", "roc", "pr"),
    "Examples and worst errors": ("examples", "errors"),
    "What the network looked at": ("gradcam",),
}
_ELSEWHERE = ("audit", "metrics", "curves", "reliability", "drift", "augmentation", "corruptions")


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
    figures: Mapping[str, Figure],
    notes: Sequence[str],
    calibration: dict | None = None,
    drift: dict | None = None,
    augmentation: Sequence[str] = (),
    tta: dict | None = None,
    corruptions: dict | None = None,
) -> None:
    """Writes the report of a run to `path`, whole or not at all; equal inputs, equal bytes.

    Args:
      path: the HTML file; its folder is made where missing.
      title: headline.
      command: the command line that repeats the run.
      config: resolved configuration; `seed` is shown by itself.
      environment: versions and devices, shown as they are; of these `commit`, `weights`
        (`{"name", "sha256", "report"}`), `data_sha256` and `target` (`{"name", "source", "images":
        {split: n}, "labelled": (split, ...), "notes", "sha256"}`, the unlabelled set that was
        adapted to) and `audit` (of `data.audit.audit_dataset`, or "off") have a place of their own.
      data: `{"name", "task", "classes", "counts": {split: {row: number or short text}},
        "images": {split: n}, "patients": {split: n} or None, "image_size", "channels",
        "licence", "source", "notes", "sha256"}`; `report.datacard` makes counts and images.
      history: one record an epoch; empty for a run that trains nothing.
      metrics: `{split: {metric: {"value", "ci95", "n", ...}}}`; the headline is `test`, or
        the last split where there is no `test`; `<split>_patient` is a split by patient.
      figures: by name, each with its caption as label, see `report.figures.draw_figures`.
      notes: lines for the top of the report.
      calibration: the content of `calibration.json`, None where nothing was fitted.
      drift: the content of `drift.json`, see `report.drift`, None where nothing was measured.
      augmentation: lines on what was done to the training images, empty where nothing was.
      tta, corruptions: the content of `tta.json` and `corruptions.json`, see
        `report.robustness`; None where it was not asked for.

    Raises:
      UserError: the file cannot be written (disk full, no permission).
    """
    drawn = pictures(figures)
    if_any = [
        ("Calibration", calibration_part(metrics, calibration, drawn.get("reliability", ""))),
        ("Operating points", thresholds_part(metrics, calibration)),
        ("Test-time augmentation", tta_part(tta)),
        ("Corrupted images", corruptions_part(corruptions, drawn.get("corruptions", ""))),
        ("What fine-tuning changed", drift_part(drift, drawn.get("drift", ""))),
    ]
    sections = [
        headline(data["task"], metrics, notes),
        section("How to reproduce", _reproduce(command, config, environment, data)),
        section("Data", _data_card(data) + _target_card(environment.get("target"))),
        *_audit(environment.get("audit"), drawn.get("audit", "")),
        *_augmentation(augmentation, drawn.get("augmentation", "")),
        section("Training", _training(history, drawn.get("curves", ""))),
        section("Metrics", drawn.get("metrics", "") + metrics_part(data["task"], metrics)),
        *(section(heading, body) for heading, body in _figure_sections(drawn)),
        *(section(heading, body) for heading, body in if_any if body),
        section("Weights", _weights(environment.get("weights"))),
        section("Configuration", details("all settings", as_json(config))),
        section("Environment", _environment(environment)),
    ]
    write_file(pathlib.Path(path), page(title, "\n".join(sections)))


def _figure_sections(drawn: Mapping[str, str]) -> list[tuple[str, str]]:
    placed = {name for names in _FIGURES.values() for name in names} | set(_ELSEWHERE)
    sections = _FIGURES | {name: (name,) for name in drawn if name not in placed}
    return [
        (heading, side_by_side([drawn[name] for name in names if name in drawn]))
        for heading, names in sections.items()
        if any(name in drawn for name in names)
    ]


def _reproduce(command: str, config: dict, environment: dict, data: dict) -> str:
    weights = environment.get("weights") or {}
    known = {
        "seed": config.get("seed"),
        "commit": environment.get("commit"),
        "weights": weights.get("name"),
        "weights sha256": weights.get("sha256"),
        "data": data["name"],
        "data sha256": data.get("sha256") or environment.get("data_sha256"),
    }
    return f'<pre class="command">{text(command)}</pre>' + facts(known)


def _data_card(data: dict) -> str:
    counts, patients, classes = data["counts"], data["patients"], list(data["classes"])
    names = list(dict.fromkeys(name for column in counts.values() for name in column))
    rows = [
        # Figures write #<index> for a name that their font cannot draw.
        [
            f"#{classes.index(name)} {printable(name)}" if name in classes else name,
            *(column.get(name, "") for column in counts.values()),
        ]
        for name in names
    ]
    rows.append(["images", *(data["images"][split] for split in counts)])
    if patients:
        rows.append(["patients", *(patients.get(split, "not known") for split in counts)])
    known = {
        "task": data["task"],
        "image size": data["image_size"],
        "channels": data["channels"],
        "licence": data["licence"],
        "source": data["source"],
    }
    if not patients:
        known["patients"] = "not known: two images of one patient may be in different splits"
    numbers = all(isinstance(cell, int) for row in rows[: len(names)] for cell in row[1:])
    return table(["", *counts], rows, numbers) + facts(known) + bullets(data["notes"])


def _target_card(target: dict | None) -> str:
    """The set that the network was adapted to, where there is one."""
    if target is None:
        return ""
    known = {
        "adapted to": target["name"],
        "its images": ", ".join(f"{split} {n}" for split, n in target["images"].items()),
        "its labels": ", ".join(target["labelled"]) or "none",
        "its source": target["source"],
        "its sha256": target["sha256"],
    }
    return facts(known) + bullets(target["notes"])


def _audit(audit: dict | str | None, picture: str) -> list[str]:
    """The section on the audit of the data, where the run trained on them."""
    return [section("Data audit", audit_part(audit) + picture)] if audit else []


def _augmentation(lines: Sequence[str], picture: str) -> list[str]:
    """The section on augmentation, where there was any."""
    return [section("Augmentation", bullets(lines) + picture)] if lines else []


def _training(history: Sequence[dict], picture: str) -> str:
    if not history:
        return "<p>This run trained nothing.</p>"
    keys = list(dict.fromkeys(key for record in history for key in record))
    rows = [[_number(record.get(key)) for key in keys] for record in history]
    heads = [key.replace("_", " ") for key in keys]
    return picture + details("every epoch", table(heads, rows, numbers=True))


def _weights(weights: dict | None) -> str:
    if not weights:
        return "<p>No pretrained weights were loaded.</p>"
    rest = {key: value for key, value in weights.items() if key != "report"}
    report = weights.get("report")
    return facts(rest) + (details("loading report", anything(report)) if report else "")


def _environment(environment: dict) -> str:
    placed = ("weights", "target", "audit")
    return facts({key: value for key, value in environment.items() if key not in placed})


def _number(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
