"""From predictions to what a run folder shows: metrics, figures, report, TensorBoard events."""

import dataclasses
import math
import pathlib

import jax
import numpy as np

from experiments.auditing import draw_copies
from experiments.augmentation import augmentation_lines, draw_sheet
from experiments.explaining import explain
from experiments.robustness import measure_robustness, say_measured
from experiments.study import Effort, Fitted, Request
from medtl_jax import runs
from medtl_jax.console import Console
from medtl_jax.data.catalog import Split
from medtl_jax.errors import UserError
from medtl_jax.metrics import calibration as calibrations
from medtl_jax.metrics.calibration import (
    FITTED_ON,
    Calibration,
    calibration_scores,
    fit_calibration,
)
from medtl_jax.metrics.patients import by_patient
from medtl_jax.metrics.temperature import scaled
from medtl_jax.metrics.thresholds import operating_scores
from medtl_jax.metrics.uncertainty import score_with_intervals
from medtl_jax.objectives.task import Task
from medtl_jax.report.drift import drift_figure
from medtl_jax.report.figures import View, draw_figures
from medtl_jax.report.html import write_report
from medtl_jax.report.predict import Predictions, write_predictions
from medtl_jax.report.style import save_figures
from medtl_jax.report.tables import (
    BY_PATIENT,
    HEADLINE,
    OBSERVER,
    main_split,
    metrics_table,
    split_label,
)
from medtl_jax.report.tensorboard import write_metrics


def calibrate(config: dict, task: Task, predictions: dict[str, Predictions]) -> Calibration:
    """Temperature and operating points, fitted on the validation split alone."""
    val = predictions[FITTED_ON]
    sensitivity = config["eval"]["target_sensitivity"]
    return fit_calibration(
        task.name, val.target, val.score, task.classes, sensitivity, val.patients
    )


def finish(
    request: Request,
    environment: dict,
    fitted: Fitted,
    predictions: dict[str, Predictions],
    calibration: Calibration | None,
    history: list[dict],
    notes: list[str],
    fitted_on: str,
    drift: dict | None = None,
    train: Split | None = None,
) -> None:
    """Writes predictions, figures, report and, last of all, `metrics.json`; prints the table.

    A brief request gets neither figures nor report nor events, and nothing is measured beside the
    scores.

    Args:
      request, environment, fitted, history, notes: what the report tells of.
      predictions: of each split.
      calibration: what was fitted on the validation split of the run that trained `fitted`, None
        where that run was interrupted.
      fitted_on: the split of `predictions` that it was fitted on; `""` where none of them is, as
        of other data than the run's.
      drift: the content of `drift.json`, None where nothing was measured.
      train: the training images, to show how they were augmented; None where nothing was trained.
    """
    folder, config, task = request.folder, request.config, fitted.task
    write_predictions(folder / "predictions.npz", predictions)
    metrics, patient_notes = score_splits(task, predictions, calibration, config, fitted_on)
    card = calibration and calibrations.to_json(task.name, calibration, task.classes)
    if card:
        runs.write_json(folder / runs.CALIBRATION, card)
    if drift:
        runs.write_json(folder / runs.DRIFT, drift)
    if history:
        runs.write_json(folder / runs.COST, _cost(request, history))
    robust = measure_robustness(request, fitted, predictions, metrics, main_split(metrics))
    if not request.brief:
        shown = (predictions, metrics, history, calibration, fitted_on, drift)
        drawn = _draw(request, fitted, *shown) | robust.figures()
        lines = augmentation_lines(config) if train is not None else []
        if lines:
            drawn["augmentation"] = draw_sheet(config, train)
        drawn |= draw_copies(environment.get("audit"), train, predictions)
        save_figures(drawn, folder / "figures")
        write_report(
            folder / "report.html",
            title=f"{config['experiment']}: {environment['data']['name']}",
            command=request.command,
            config=config,
            environment={key: value for key, value in environment.items() if key != "data"},
            data=environment["data"],
            history=history,
            metrics=metrics,
            figures=drawn,
            notes=[*notes, *patient_notes, *robust.notes],
            calibration=card,
            drift=drift,
            augmentation=lines,
            tta=robust.tta,
            corruptions=robust.corruptions,
        )
        write_metrics(folder / runs.EVENTS, metrics, history[-1]["step"] if history else 0)
    # The order of the metrics is that of the tables, also when a finished run is shown again.
    runs.write_json(folder / runs.METRICS, metrics, sort_keys=False)
    _say(folder, metrics, request.console)


def _draw(
    request: Request,
    fitted: Fitted,
    predictions: dict[str, Predictions],
    metrics: dict[str, dict],
    history: list[dict],
    calibration: Calibration | None,
    fitted_on: str,
    drift: dict | None,
) -> dict:
    """The figures of the main split."""
    task, split = fitted.task, main_split(metrics)
    scaling = calibration if split != fitted_on else None
    view = _view(task, predictions[split], metrics[split], history, scaling)
    thresholds = _thresholds(task, calibration)
    explained = None
    if fitted.has_head:
        explained = explain(fitted, predictions[split], request.config["seed"], thresholds)
    view = dataclasses.replace(view, explanations=explained, thresholds=thresholds)
    drawn = draw_figures(task.name, view)
    changed = drift_figure(drift) if drift else None
    return drawn | ({"drift": changed} if changed else {})


def begin_cost(request: Request) -> None:
    """Writes what the run has taken before its first step, which is not repeated if it goes on."""
    runs.write_json(request.folder / runs.COST, _prepared(request.effort))


def _prepared(effort: Effort) -> dict[str, float]:
    return {
        "prepare_seconds": round(effort.seconds, 3),
        "prepare_cpu_seconds": round(effort.cpu_seconds, 3),
    }


def _cost(request: Request, history: list[dict]) -> dict[str, float | str | None]:
    """The content of `cost.json`: what features, probe and training took, and their memory.

    `train_seconds` and `cpu_seconds` are without compilation: programs are kept on disk, and it is
    the first run of several that compiles them. `prepare_seconds` counts features and probes also
    where an earlier run had computed them. `step_bytes` and `data_bytes` are those of
    `runner.planned_bytes`.
    """
    path, prepared = request.folder / runs.COST, _prepared(request.effort)
    if path.is_file():
        begun = runs.read_json(path)
        prepared = {key: max(value, begun.get(key, 0.0)) for key, value in prepared.items()}
    steps = [record for record in history if record["step"]]
    most = {
        key: max((record[key] for record in steps if key in record), default=None)
        for key in ("step_bytes", "data_bytes")
    }
    worked = sum(record["cpu_seconds"] for record in steps) + prepared["prepare_cpu_seconds"]
    return {
        "device": jax.devices()[0].device_kind,
        "prepare_seconds": prepared["prepare_seconds"],
        "train_seconds": round(sum(record["seconds"] for record in steps), 3),
        "compile_seconds": round(sum(record["compile_seconds"] for record in steps), 3),
        "cpu_seconds": round(worked, 3),
        **most,
    }


def _thresholds(task: Task, calibration: Calibration | None) -> np.ndarray | None:
    """Youden's threshold of each finding, float `[k]`, NaN where it could not be fitted."""
    if task.name != "multilabel" or calibration is None:
        return None
    points = [calibration.thresholds[name]["youden"].value for name in task.classes]
    return np.array([math.nan if value is None else value for value in points])


def _view(
    task: Task,
    shown: Predictions,
    metrics: dict[str, dict],
    history: list[dict],
    scaling: Calibration | None,
) -> View:
    """What the figures show of one split; `scaling` has the temperatures to show beside it."""
    calibrated = None
    if scaling and scaling.temperatures:
        calibrated = scaled(task.name, shown.score, scaling.temperatures)
    return View(
        classes=task.classes,
        target=shown.target,
        score=shown.score,
        images=shown.images,
        ids=shown.ids,
        metrics=metrics,
        history=history,
        calibrated=calibrated,
        mask2=shown.mask2,
    )


def score_splits(
    task: Task,
    predictions: dict[str, Predictions],
    calibration: Calibration | None,
    config: dict,
    fitted_on: str,
) -> tuple[dict[str, dict], list[str]]:
    """The content of `metrics.json`, and notes on patients that are not scored as one.

    `{split: {metric: {"value", "ci95", "n"}}}`. What `calibration` brings is scored on all splits
    but `fitted_on`. Beside a split stand `<split>_patient`, where each of the patients with several
    images counts once, and `<split>_observer2`, a second observer's masks.
    """
    options = {"resamples": config["eval"]["resamples"], "seed": config["seed"]}
    surfaces = {"tolerance": config["eval"]["surface_tolerance"]} if task.name == "segment" else {}
    metrics, notes = {}, []
    if task.name == "segment" and any(p.patients is not None for p in predictions.values()):
        notes.append("Masks are scored by image; intervals resample whole patients.")
    for name, found in predictions.items():
        given = (task.name, found.target, found.score, task.classes)
        metrics[name] = score_with_intervals(*given, found.patients, **options, **surfaces)
        brought = calibration if name != fitted_on else None
        if brought:
            for scores, fitted in (
                (calibration_scores, brought.temperatures),
                (operating_scores, brought.thresholds),
            ):
                metrics[name] |= scores(*given, fitted, found.patients, **options)
        if found.mask2 is not None:
            drawn = np.eye(len(task.classes), dtype=np.float16)[found.mask2]
            metrics[name + OBSERVER] = score_with_intervals(
                task.name, found.target, drawn, task.classes, found.patients, **options, **surfaces
            )
        patients = found.patients
        if task.name == "segment" or patients is None or len(set(patients)) == len(patients):
            continue
        scored, reason = _score_patients(task, found, brought, options)
        if scored:
            metrics[name + BY_PATIENT] = scored
        if reason:
            notes.append(f"{reason[0].upper()}{reason[1:]} (split {name}).")
    return metrics, notes


def _score_patients(
    task: Task, found: Predictions, calibration: Calibration | None, options: dict
) -> tuple[dict[str, dict], str]:
    """The scores of a split where each patient counts once, and what of them is missing and why."""
    merged = by_patient(task.name, found.target, found.score, found.patients)
    if merged.reason:
        return {}, f"no scores by patient: {merged.reason}"
    given = (task.name, merged.target, merged.score, task.classes)
    scored = score_with_intervals(*given, **options)
    if calibration is None:
        return scored, ""
    images = (task.name, found.target, found.score, task.classes, calibration.temperatures)
    scored |= calibration_scores(*images, found.patients, merge=True, **options)
    if calibration.without_patients:
        return scored, f"no operating points by patient: {calibration.without_patients}"
    return scored | operating_scores(*given, calibration.patient_thresholds, **options), ""


def say_finished(request: Request) -> None:
    """Prints the result of a run that ended earlier. UserError if a file of it is damaged."""
    path = request.folder / runs.METRICS
    request.console.note(f"{request.folder} is finished; for another run name another --workdir")
    say_measured(request.folder, request.console)
    try:
        _say(request.folder, runs.read_json(path, most_bytes=100_000_000), request.console)
    except (KeyError, TypeError, AttributeError, StopIteration):
        raise UserError(f"{path} is damaged; delete it to have it written again") from None


def _say(folder: pathlib.Path, metrics: dict, console: Console) -> None:
    split = main_split(metrics)
    console.note(f"\n{split} split\n{metrics_table(metrics[split])}")
    if second := metrics.get(split + OBSERVER):
        shown = {name: second[name] for name in HEADLINE["segment"]}
        console.note(f"\n{split_label(split + OBSERVER)}\n{metrics_table(shown)}")
    say_report(folder, console)


def say_report(folder: pathlib.Path, console: Console) -> None:
    """Names the report of a finished run; a brief one has none."""
    path = folder / "report.html"
    if path.is_file():
        console.note(f"\nreport: {path}")
