"""From images to patients: one target and one score for each patient.

A patient with twenty images counts twenty times in a metric over images. Where the decision is
made for the patient, the images' scores are averaged first, and each patient counts once.
"""

import dataclasses

import numpy as np

from medtl_jax.data.catalog import MISSING

# Tasks with several targets an image.
_SEVERAL = ("multilabel", "regress")


@dataclasses.dataclass(frozen=True)
class PatientLevel:
    """One row a patient, or the reason why there can be none.

    Attributes:
      ids: patients `[p]`, sorted.
      target: `[p]` or `[p, k]`, as of the images; None where `reason` says why.
      score: `[p, k]`, as of the images; None where `reason` says why.
      reason: `""`, or why the images cannot be put together.
    """

    ids: np.ndarray
    target: np.ndarray | None
    score: np.ndarray | None
    reason: str = ""


def by_patient(
    task: str, target: np.ndarray, score: np.ndarray, patients: np.ndarray
) -> PatientLevel:
    """Returns target and score of each patient, in the shape and dtype of the images'.

    The score is the mean over the patient's images. The target of `classify` and `ordinal` is
    the images' common class; where one patient's images differ, no patient has values, and
    `reason` counts those patients. `multilabel`: 1 if a known label of the patient is 1, 0 if all
    known ones are 0, `MISSING` if none is known. `regress`: the mean of the known numbers (age
    may change between two images). Where only some of a patient's labels are known, the score is
    the mean over just those images: what is compared must come from the same images.

    Args:
      task: `classify`, `ordinal`, `multilabel` or `regress`.
      target: `[n]` or `[n, k]`, see `data.catalog.Split`.
      score: float `[n, k]`, probabilities or numbers.
      patients: of each image, `[n]`.

    Raises:
      ValueError: another task (masks have no mean), or arrays that do not hold together.
    """
    target, score, patients = np.asarray(target), np.asarray(score), np.asarray(patients)
    _check(task, target, score, patients)
    ids, group = np.unique(patients, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(ids)))
    target, score = target[order], score[order]
    if task not in _SEVERAL:
        lowest, highest = (np.minimum.reduceat(target, starts), np.maximum.reduceat(target, starts))
        if differing := np.count_nonzero(lowest != highest):
            reason = f"{differing} of {len(ids)} patients have images of more than one class"
            return PatientLevel(ids, None, None, reason)
        return PatientLevel(ids, lowest, _means(score, np.ones(score.shape, bool), starts))
    if task == "multilabel":
        known = target != MISSING
        # MISSING lies below absent, which lies below present.
        merged = np.maximum.reduceat(target, starts)
    else:
        known = ~np.isnan(target)
        merged = _means(target, known, starts)
    unknown = ~np.logical_or.reduceat(known, starts)
    counted = known | np.repeat(unknown, np.diff(starts, append=len(target)), axis=0)
    return PatientLevel(ids, merged, _means(score, counted, starts))


def _check(task: str, target: np.ndarray, score: np.ndarray, patients: np.ndarray) -> None:
    if task not in ("classify", "ordinal", *_SEVERAL):
        raise ValueError(f"want a task with one row of scores an image, got {task!r}")
    if score.ndim != 2 or target.shape != (score.shape if task in _SEVERAL else score.shape[:1]):
        raise ValueError(f"{task}: target {target.shape} does not fit score {score.shape}")
    if len(score) == 0 or patients.shape != score.shape[:1]:
        raise ValueError(f"want a patient for each of {len(score)} images, got {patients.shape}")


def _means(values: np.ndarray, counted: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Means `[p, k]` over the counted values of each run of rows, NaN where none is counted."""
    totals = np.add.reduceat(np.where(counted, values, 0), starts, dtype=np.float64)
    numbers = np.add.reduceat(counted, starts, dtype=np.float64)
    empty = np.full(totals.shape, np.nan)
    return np.divide(totals, numbers, out=empty, where=numbers > 0).astype(values.dtype)
