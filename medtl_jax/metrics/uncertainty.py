"""The uncertainty of every metric: bootstrap intervals, and DeLong's for the AUC.

A draw is held as a count per image, so every metric is a function of weighted sums and all draws
are scored together instead of one after another. `intervals` says which interval is made of them.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from medtl_jax.data.catalog import Array
from medtl_jax.metrics import delong
from medtl_jax.metrics.delong import NO_INTERVAL
from medtl_jax.metrics.entries import Score, macro
from medtl_jax.metrics.intervals import (
    Draws,
    bootstrap_counts,
    counts_without,
    interval_of,
    share_of,
)
from medtl_jax.metrics.scores import (
    Cases,
    prepare,
    proportions,
    scored_classes,
    scores_of,
    task_module,
)


def score_with_intervals(
    task: str,
    target: Array,
    score: Array,
    classes: Sequence[str],
    patients: np.ndarray | None = None,
    *,
    mask: np.ndarray | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    surfaces: bool = True,
    tolerance: float = 2.0,
) -> dict[str, dict]:
    """Returns `{metric: {"value", "ci95", "n"}}`, ready for JSON, for all metrics of the task.

    The metrics are those of `scores.task_scores`. `value` and `ci95` (`[low, high]`; `ci90` for
    `level=0.9`) are None where undefined, and `reason` then says why; beside a value it names the
    classes that a mean leaves out. `n` counts images; with `patients` there is also `n_patients`.
    AUCs and their means have DeLong's interval as well (`delong95`), None where there is none.

    A resample in which a metric is undefined is left out of that metric's interval; where this
    happens to more than 5 % of them there is no interval. Nor is there one where no resample
    differs, unless the metric is a proportion of images, see `intervals`.

    Args:
      task: one of `catalog.TASKS`.
      target: as in `catalog.Split`.
      score: probabilities or numbers, see `scores.task_scores`.
      classes: k class names.
      patients: patient of each image `[n]`; whole patients are then drawn.
      mask: bool `[n]`, True where an image counts, False for padding; None counts all.
      resamples: number of draws.
      level: coverage of the interval, between 0 and 1.
      seed: of the draws; the same seed gives the same numbers.
      surfaces: segment: whether HD95 and NSD are computed, which takes longest.
      tolerance: segment: of the normalised surface distance, in pixels.

    Raises:
      ValueError: unusable arguments, see also `scores.task_scores`.
    """
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"want resamples >= 1 and 0 < level < 1, got {resamples}, {level}")
    if patients is not None and np.shape(patients) != (len(target),):
        raise ValueError(f"want a patient for each of {len(target)} images, got {len(patients)}")
    cases = prepare(task, target, score, classes, mask=mask, surfaces=surfaces, tolerance=tolerance)
    if patients is not None and mask is not None:
        patients = np.asarray(patients)[mask]
    draws = _draw(task, cases, patients, resamples, seed)
    result = {
        name: _entry(name, point, draws, level, patients is not None)
        for name, point in scores_of(task, cases).items()
    }
    for name, interval in _delong(task, cases, patients, level).items():
        result[name][f"delong{100 * level:g}"] = interval
        if interval is None and result[name]["value"] is not None:
            reasons = (result[name].get("reason"), NO_INTERVAL)
            result[name]["reason"] = "; ".join(filter(None, reasons))
    return result


def _entry(name: str, point: Score, draws: Draws, level: float, by_patient: bool) -> dict:
    """One metric as in `metrics.json`."""
    interval, reason = None, ""
    if not math.isnan(point.value):
        interval, reason = interval_of(draws, name, point.value, level, by_patient)
    reason = "; ".join(filter(None, (point.reason, reason)))
    return {
        "value": None if math.isnan(point.value) else point.value,
        f"ci{100 * level:g}": interval,
        "n": point.n,
        **({"n_patients": draws.units} if by_patient else {}),
        **({"reason": reason} if reason else {}),
    }


def weighted_scores(task: str, cases: Cases, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns each metric of r weighted samples at once, `[k, r]` or `[1, r]`, NaN where undefined.

    The numbers are those of `scores.task_scores` on the images repeated `counts` times. Rows are
    those of `scores.scored_classes`; metrics without classes have one.

    Args:
      task: one of `catalog.TASKS`.
      cases: n images, see `scores.prepare`.
      counts: non-negative `[n, r]`, how often each image occurs in each sample.
    """
    return task_module(task).weighted(cases, np.asarray(counts, np.float64))


def overall_scores(task: str, cases: Cases, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the metrics over all classes of r weighted samples, `[r]` each.

    The classes are those that the whole split defines; in a sample that lacks one the mean over
    them is undefined. The arguments are those of `weighted_scores`.
    """
    counts = np.asarray(counts, np.float64)
    return _overall(task, cases, counts, weighted_scores(task, cases, counts))


def _overall(task: str, cases: Cases, counts: np.ndarray, drawn: dict) -> dict[str, np.ndarray]:
    module = task_module(task)
    never = module.left_out(cases, np.ones((len(cases), 1)))
    lacking = module.left_out(cases, counts)
    found = {}
    for metric, values in drawn.items():
        if metric in never:
            values = np.where(lacking[metric] & ~never[metric], math.nan, values)
        found[metric] = macro(values, never.get(metric, False))
    return found


def _draw(task: str, cases: Cases, patients: np.ndarray | None, resamples: int, seed: int) -> Draws:
    if patients is None:
        unit = np.arange(len(cases))
    else:
        unit = np.unique(np.asarray(patients), return_inverse=True)[1]
    units = int(unit.max()) + 1
    bootstrap = bootstrap_counts(units, len(cases), resamples, seed)
    without = counts_without(units, len(cases), seed)
    return Draws(
        *(
            _named(task, cases, (counts[unit] for counts in chunks))
            for chunks in (bootstrap, without)
        ),
        units,
        {name: share_of(*pair, unit) for name, pair in proportions(task, cases).items()},
    )


def _named(task: str, cases: Cases, chunks: Iterator[np.ndarray]) -> dict[str, np.ndarray]:
    """All values, `[r]` under the names of `scores.task_scores`; counts over the images."""
    classes = scored_classes(task, cases.classes)
    found: dict[str, list[np.ndarray]] = {}
    for whole in chunks:
        counts = whole.astype(np.float64)
        drawn = weighted_scores(task, cases, counts)
        for metric, values in _overall(task, cases, counts, drawn).items():
            found.setdefault(metric, []).append(values)
            if len(drawn[metric]) == len(classes):
                for name, row in zip(classes, drawn[metric], strict=True):
                    found.setdefault(f"{metric}/{name}", []).append(row)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _delong(
    task: str, cases: Cases, patients: np.ndarray | None, level: float
) -> dict[str, list[float] | None]:
    """DeLong's interval of each AUC and of their mean, by name."""
    if task in ("segment", "regress"):
        return {}
    if task == "multilabel":
        present, score = cases.target, cases.score
    else:
        present, score = np.eye(len(cases.classes), dtype=np.int64)[cases.target], cases.score
        if len(cases.classes) == 2:
            # Both classes share the AUC of class 1.
            present, score = present[:, [1, 1]], score[:, [1, 1]]
    both = (present == 1).any(axis=0) & (present == 0).any(axis=0)
    if task == "multilabel":
        averaged = {"auc": both, "auc_frequent": task_module(task).frequent(cases)}
    else:
        averaged = {"auc": np.full(len(both), both.all())}
    single = np.eye(len(both), dtype=bool)
    columns = averaged | {f"auc/{name}": single[i] for i, name in enumerate(cases.classes)}
    return {
        name: delong.auc_interval(present[:, kept], score[:, kept], level, patients)
        if kept.any()
        else None
        for name, kept in columns.items()
    }
