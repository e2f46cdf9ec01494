"""Calibration: what is fitted on validation (temperatures, thresholds), and how good it is.

`calibration.json` of a run folder holds it; `metrics.temperature` and `metrics.thresholds` fit it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medtl_jax.data.catalog import MISSING, Array
from medtl_jax.errors import UserError
from medtl_jax.files import is_text
from medtl_jax.metrics import segmentation
from medtl_jax.metrics.patients import by_patient
from medtl_jax.metrics.temperature import (
    HIGHEST,
    LOWEST,
    Temperature,
    fit_temperature,
    scaled,
)
from medtl_jax.metrics.thresholds import (
    POINTS,
    Threshold,
    check_sensitivity,
    fit_thresholds,
    question_names,
)
from medtl_jax.metrics.uncertainty import score_with_intervals
from medtl_jax.metrics.weighted import BINS, bins, ratio

FITTED_ON = "val"
CALIBRATED = ("ece", "brier", "nll")
_KEYS = (
    "fitted_on",
    "target_sensitivity",
    "temperature",
    "thresholds",
    "patient_thresholds",
    "reasons",
)
# Under which `reasons` say why there are no thresholds for patients.
_PATIENTS = "patient_thresholds"
_MOST_REASON = 500


Thresholds = Mapping[str, Mapping[str, Threshold]]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was fitted on the validation predictions of a run.

    Attributes:
      target_sensitivity: of the operating point `sensitivity`.
      temperatures: one, one a finding (`multilabel`), or none (`regress`).
      thresholds: `{question: {point: Threshold}}`, see `metrics.thresholds`.
      patient_thresholds: likewise, for the mean probability of a patient's images; empty where
        there are none.
      without_patients: why there are none; `""` where a task has no thresholds at all.
    """

    target_sensitivity: float
    temperatures: tuple[Temperature, ...]
    thresholds: Thresholds
    patient_thresholds: Thresholds = dataclasses.field(default_factory=dict)
    without_patients: str = ""


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Confidence and accuracy of bins of equal width, float64 `[15]`; NaN where a bin is empty.

    Attributes:
      confidence: mean probability.
      accuracy: share of the images that are right (or positive).
      count: int64 `[15]`, images.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def fit_calibration(
    task: str,
    target: Array,
    score: Array,
    classes: Sequence[str],
    target_sensitivity: float,
    patients: np.ndarray | None = None,
) -> Calibration:
    """Returns temperatures and thresholds for the predictions of the validation split.

    For `regress` there is nothing to fit, for `segment` there are no thresholds. Where patients
    have several images there are thresholds for patients too: the mean of several probabilities
    is spread less than each of them.

    Args:
      task: one of `catalog.TASKS`.
      target: see `catalog.Split`.
      score: probabilities `[n, k]`, `segment`: `[n, h, w, k]`.
      classes: k names.
      target_sensitivity: in (0, 1].
      patients: of each image `[n]`, None where they are not known.

    Raises:
      UserError: `target_sensitivity` (`eval.target_sensitivity`) is out of range.
      ValueError: target, score and classes do not hold together.
    """
    check_sensitivity(target_sensitivity)
    temperatures = () if task == "regress" else fit_temperature(task, target, score)
    thresholds = fit_thresholds(task, target, score, classes, target_sensitivity)
    of_patients, reason = {}, ""
    if thresholds and (reason := _alone(patients)) == "":
        merged = by_patient(task, target, score, patients)
        reason = merged.reason
        if not reason:
            of_patients = fit_thresholds(
                task, merged.target, merged.score, classes, target_sensitivity
            )
    return Calibration(target_sensitivity, temperatures, thresholds, of_patients, reason)


def _alone(patients: np.ndarray | None) -> str:
    """Why the patients of the validation split are not told from its images, `""` if they are."""
    if patients is None:
        return "the validation images name no patient"
    return "" if len(set(patients)) < len(patients) else "no patient has two validation images"


def calibration_scores(
    task: str,
    target: Array,
    score: Array,
    classes: Sequence[str],
    temperatures: Sequence[Temperature],
    patients: np.ndarray | None = None,
    *,
    merge: bool = False,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, dict]:
    """Returns `ece_calibrated`, `brier_calibrated` and `nll_calibrated`, as in `metrics.json`.

    They are those of `uncertainty.score_with_intervals` for the probabilities after temperature
    scaling; per finding `ece_calibrated/<name>` where these exist. The entry's `reason` names
    the findings whose temperature could not be fitted. Empty for `regress`, which has no such
    metrics.

    Args:
      task: one of `catalog.TASKS`.
      target: see `catalog.Split`.
      score: float `[n, k]`, `segment`: `[n, h, w, k]`, before scaling.
      classes: k names.
      temperatures: of `fit_temperature`, fitted on another split.
      patients: of each image `[n]`; whole patients are then resampled.
      merge: whether each patient is scored once, by the mean of the images' scaled probabilities.
      resamples, level, seed: of the bootstrap.

    Raises:
      ValueError: arguments that do not hold together; patients that cannot be merged, see
        `patients.by_patient`.
    """
    if task == "regress":
        return {}
    after = scaled(task, score, temperatures)
    if merge:
        merged = by_patient(task, target, after, patients)
        if merged.reason:
            raise ValueError(f"patients cannot be scored as one: {merged.reason}")
        target, after, patients = merged.target, merged.score, None
    options = {"resamples": resamples, "level": level, "seed": seed, "surfaces": False}
    entries = score_with_intervals(task, target, after, classes, patients, **options)
    unfitted = _unfitted(task, classes, temperatures)
    result = {}
    for name, entry in entries.items():
        metric, slash, label = name.partition("/")
        if metric in CALIBRATED:
            result[f"{metric}_calibrated{slash}{label}"] = _with_reason(entry, unfitted, label)
    return result


def _unfitted(
    task: str, classes: Sequence[str], temperatures: Sequence[Temperature]
) -> dict[str, str]:
    """Why temperatures were not fitted, by finding, or under `""`."""
    labels = classes if task == "multilabel" else ("",)
    return {
        label: temperature.reason
        for label, temperature in zip(labels, temperatures, strict=True)
        if temperature.reason
    }


def reliability(target: np.ndarray, score: np.ndarray) -> Reliability:
    """Returns mean confidence, accuracy and number of images of each bin of the confidence.

    The bins are those of the expected calibration error: `(0, 1/15], (1/15, 2/15], ...`; a
    probability of 0 is in the first.

    Args:
      target: int `[n]`; labels, or of one finding 1, 0 and `MISSING` (left out).
      score: float `[n, k]`: the confidence is the highest probability, and an image is right
        where its class is the label; or `[n]`: the confidence is the probability of the
        finding, and the accuracy its frequency.

    Raises:
      ValueError: arrays that do not hold together.
    """
    target, score = np.asarray(target), np.asarray(score, np.float64)
    if target.ndim != 1 or score.shape[:1] != target.shape or score.ndim > 2:
        raise ValueError(f"want target [n], score [n] or [n, k], got {target.shape}, {score.shape}")
    if score.ndim == 2:
        confidence, right = score.max(axis=1), score.argmax(axis=1) == target
    else:
        known = target != MISSING
        confidence, right = score[known], target[known] == 1
    place = bins(confidence)
    count, *sums = (
        np.bincount(place, weights=values, minlength=BINS) for values in (None, confidence, right)
    )
    return Reliability(*(ratio(values, count) for values in sums), count)


def pixel_reliability(cases: segmentation.Cases) -> Reliability:
    """Returns the same of all pixels of masks, the confidence being the highest probability."""
    count, confidence, right = cases.bins.sum(axis=0)
    return Reliability(ratio(confidence, count), ratio(right, count), count.astype(np.int64))


def to_json(task: str, calibration: Calibration, classes: Sequence[str]) -> dict[str, Any]:
    """Returns the content of `calibration.json`.

    `{"fitted_on": "val", "target_sensitivity": s, "temperature": [T, ...], "thresholds":
    {question: {"youden": t, "sensitivity": t}}, "patient_thresholds": likewise or {}, "reasons":
    {...}}`. A threshold that does not exist is None. `reasons` says why, under `<point>/<question>`
    or `patient/<point>/<question>`; why a temperature stayed 1, under `temperature` or
    `temperature/<finding>`; and why there are no thresholds for patients, under
    `patient_thresholds`.
    """
    names = _temperature_names(task, classes)
    reasons = {
        name: temperature.reason
        for name, temperature in zip(names, calibration.temperatures, strict=True)
    }
    reasons[_PATIENTS] = calibration.without_patients
    values = {}
    kinds = (("", calibration.thresholds), ("patient/", calibration.patient_thresholds))
    for prefix, thresholds in kinds:
        values[prefix] = {}
        for question, points in thresholds.items():
            values[prefix][question] = {point: found.value for point, found in points.items()}
            reasons |= {f"{prefix}{p}/{question}": found.reason for p, found in points.items()}
    return {
        "fitted_on": FITTED_ON,
        "target_sensitivity": calibration.target_sensitivity,
        "temperature": [temperature.value for temperature in calibration.temperatures],
        "thresholds": values[""],
        "patient_thresholds": values["patient/"],
        "reasons": {name: reason for name, reason in reasons.items() if reason},
    }


def from_json(task: str, content: Any, classes: Sequence[str], source: str) -> Calibration:
    """Returns the calibration in the parsed `calibration.json` of a run of this task and classes.

    Args:
      task, classes: of the run.
      content: as of `to_json`, by whomever.
      source: the file's name, for the error.

    Raises:
      UserError: it is not what `to_json` writes for this task and these classes.
    """
    if not isinstance(content, dict) or set(content) != set(_KEYS):
        raise _refusal(source, f"want the keys {', '.join(_KEYS)}")
    if content["fitted_on"] != FITTED_ON:
        raise _refusal(source, f"want fitted_on to be {FITTED_ON!r}: no other split may be used")
    sensitivity = content["target_sensitivity"]
    if not _is_number(sensitivity, 0, 1) or sensitivity == 0:
        raise _refusal(source, "target_sensitivity must lie in 0 < s <= 1")
    reasons = content["reasons"]
    if not isinstance(reasons, dict) or not all(
        is_text(reason) and 0 < len(reason) <= _MOST_REASON for reason in reasons.values()
    ):
        raise _refusal(source, f"reasons must be texts of up to {_MOST_REASON} characters")
    left = dict(reasons)
    temperatures = _read_temperatures(task, content["temperature"], classes, left, source)
    thresholds = _read_thresholds(task, content["thresholds"], classes, left, source)
    of_patients, reason = {}, left.pop(_PATIENTS, "")
    if content[_PATIENTS]:
        of_patients = _read_thresholds(task, content[_PATIENTS], classes, left, source, "patient/")
    if bool(reason) != bool(thresholds and not of_patients):
        raise _refusal(source, "want thresholds for patients, or a reason why there are none")
    if left:
        raise _refusal(source, f"reasons name {len(left)} things that it does not hold")
    return Calibration(float(sensitivity), temperatures, thresholds, of_patients, reason)


def _with_reason(entry: dict, unfitted: Mapping[str, str], label: str) -> dict:
    """The entry, with why a temperature behind it is 1; `unfitted` is by finding, or under ""."""
    lines = [entry["reason"]] if "reason" in entry else []
    for name, reason in unfitted.items():
        if not label or name in ("", label):
            lines.append(f"temperature{f' of {name}' if name else ''} kept at 1: {reason}")
    return entry | ({"reason": "; ".join(lines)} if lines else {})


def _temperature_names(task: str, classes: Sequence[str]) -> list[str]:
    if task == "multilabel":
        return [f"temperature/{name}" for name in classes]
    return [] if task == "regress" else ["temperature"]


def _read_temperatures(
    task: str, values: Any, classes: Sequence[str], reasons: dict[str, str], source: str
) -> tuple[Temperature, ...]:
    """The temperatures; their reasons are taken out of `reasons`."""
    names = _temperature_names(task, classes)
    if not isinstance(values, list) or len(values) != len(names):
        raise _refusal(source, f"{task} of these classes has {len(names)} temperatures")
    if not all(_is_number(value, LOWEST, HIGHEST) for value in values):
        raise _refusal(source, f"temperatures must be numbers in {LOWEST:g}..{HIGHEST:g}")
    found = [
        Temperature(float(value), reasons.pop(name, ""))
        for name, value in zip(names, values, strict=True)
    ]
    if any(temperature.reason and temperature.value != 1 for temperature in found):
        raise _refusal(source, "a temperature that was not fitted must be 1")
    return tuple(found)


def _read_thresholds(
    task: str,
    values: Any,
    classes: Sequence[str],
    reasons: dict[str, str],
    source: str,
    prefix: str = "",
) -> dict[str, dict[str, Threshold]]:
    """The thresholds; their reasons, `prefix` before their names, are taken out of `reasons`."""
    names = question_names(task, classes)
    if not isinstance(values, dict) or set(values) != set(names):
        raise _refusal(source, "its thresholds are not those of the run's classes")
    found: dict[str, dict[str, Threshold]] = {}
    for name in names:
        points = values[name]
        if not isinstance(points, dict) or set(points) != set(POINTS):
            raise _refusal(source, f"want the thresholds {' and '.join(POINTS)} of each class")
        found[name] = {}
        for point in POINTS:
            value, reason = points[point], reasons.pop(f"{prefix}{point}/{name}", "")
            # A sum of rounded probabilities may lie a little above 1.
            if value is not None and not _is_number(value, 0, 1.02):
                raise _refusal(source, "thresholds must be probabilities or null")
            if (value is None) != bool(reason):
                raise _refusal(source, "want a reason for each threshold that is null")
            found[name][point] = Threshold(None if value is None else float(value), reason)
    return found


def _is_number(value: Any, low: float, high: float) -> bool:
    """Whether `value` is a number in `low..high`; NaN, infinities and booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _refusal(source: str, what: str) -> UserError:
    return UserError(f"{source}: {what}; delete it to go on without calibration")
