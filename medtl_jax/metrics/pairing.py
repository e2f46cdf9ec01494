"""What runs predicted for the same images, put into one order and checked against each other."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from medtl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What a run predicted for one split.

    Attributes:
      name: of the run, shown to the user.
      task: one of `data.catalog.TASKS`.
      classes: names of the classes, findings or numbers.
      ids: str `[n]`.
      target: see `data.catalog.Split`.
      score: probabilities, `[n, k]` or (`segment`) `[n, h, w, k]`; `regress`: numbers `[n, k]`.
      patients: str `[n]`, or None where they are not known.
    """

    name: str
    task: str
    classes: tuple[str, ...]
    ids: np.ndarray
    target: np.ndarray
    score: np.ndarray
    patients: np.ndarray | None = None


def align(runs: Sequence[Predicted]) -> list[Predicted]:
    """Returns the runs with their images in the order of their ids, the same in each.

    Where one run knows the patients, all do.

    Raises:
      UserError: the runs differ in task, classes, images, targets or patients; one names an image
        twice or none.
    """
    ordered = [_by_id(run) for run in runs]
    first = ordered[0]
    for other in ordered[1:]:
        _check_pair(first, other)
    known = [run for run in ordered if run.patients is not None]
    for other in known[1:]:
        if not np.array_equal(known[0].patients, other.patients):
            raise UserError(
                f"{known[0].name} and {other.name} name different patients for the same images: "
                "compare runs that read the same patient column"
            )
    patients = known[0].patients if known else None
    return [dataclasses.replace(run, patients=patients) for run in ordered]


def units_of(run: Predicted) -> np.ndarray:
    """Returns a number for what is drawn, int `[n]`: the image, or its patient."""
    if run.patients is None:
        return np.arange(len(run.ids))
    return np.unique(run.patients, return_inverse=True)[1]


def _by_id(run: Predicted) -> Predicted:
    order = np.argsort(run.ids, kind="stable")
    ids = run.ids[order]
    if len(ids) == 0 or (twice := int((ids[1:] == ids[:-1]).sum())):
        what = f"lists {twice} images twice" if len(ids) else "has no image"
        raise UserError(f"{run.name} {what}: its predictions cannot be compared")
    patients = None if run.patients is None else run.patients[order]
    return dataclasses.replace(
        run, ids=ids, target=run.target[order], score=run.score[order], patients=patients
    )


def _check_pair(first: Predicted, other: Predicted) -> None:
    """Raises UserError unless both predicted the same of the same images."""
    names = f"{first.name} and {other.name}"
    if first.task != other.task:
        raise UserError(
            f"{names} are of different tasks ({first.task}, {other.task}): compare runs of one task"
        )
    if first.classes != other.classes:
        raise UserError(
            f"{names} have different classes ({', '.join(first.classes)}; "
            f"{', '.join(other.classes)}): compare runs with the same ones"
        )
    if not np.array_equal(first.ids, other.ids):
        here, there = np.setdiff1d(first.ids, other.ids), np.setdiff1d(other.ids, first.ids)
        raise UserError(
            f"{names} did not predict the same images: {len(here)} of {len(first.ids)} are in the "
            f"first only, {len(there)} of {len(other.ids)} in the second only; compare runs on the "
            "same split of the same data"
        )
    _check_shapes(first, other)
    equal = (first.target == other.target) | _both_nan(first.target, other.target)
    differing = int((~equal.reshape(len(equal), -1).all(axis=1)).sum())
    if differing:
        raise UserError(
            f"{names} have different targets for {differing} of {len(equal)} images: one of them "
            "read other labels"
        )


def _check_shapes(first: Predicted, other: Predicted) -> None:
    """Raises UserError unless targets and scores of an image have the same shape in both."""
    if first.target.shape == other.target.shape and first.score.shape == other.score.shape:
        return
    shapes = [(run.target.shape[1:], run.score.shape[1:]) for run in (first, other)]
    if first.task == "segment" and all(len(score) == 3 for _, score in shapes):
        raise UserError(
            f"{first.name} and {other.name} predicted masks of different sizes "
            f"({_times(shapes[0][1][:2])}, {_times(shapes[1][1][:2])} pixels): compare runs of one "
            "model.image_size"
        )
    for run, (target, score) in zip((first, other), shapes, strict=True):
        k = len(run.classes)
        if score != (k,) or target not in ((), (k,)):
            raise UserError(
                f"the predictions of {run.name} are damaged: {k} classes, but targets {target} and "
                f"scores {score} an image; evaluate the run again"
            )
    raise UserError(
        f"{first.name} and {other.name} have targets of different shapes: one of them is damaged; "
        "evaluate it again"
    )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _both_nan(first: np.ndarray, other: np.ndarray) -> np.ndarray:
    # NaN, and nothing else, differs from itself.
    return (first != first) & (other != other)
