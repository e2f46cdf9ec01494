"""Which epoch is the best, and whether the validation split can tell."""

import numpy as np

from medtl_jax.data.catalog import MISSING, Array
from medtl_jax.domain.selection import Validator, best_of, choose, source_validator
from medtl_jax.errors import UserError
from medtl_jax.objectives.task import Task, count_labels

# What is undefined, or for a perfect network would be, unless validation has every class.
_OF_EVERY_CLASS = ("auc", "pr_auc", "balanced_accuracy", "f1", "dice", "iou")
_OF_TWO_CLASSES = ("mcc", "quadratic_kappa")
_OF_RANKS = ("auc", "pr_auc")
_OF_TWO_VALUES = ("r2", "pearson")


def task_validator(select: str, task: Task) -> Validator:
    """What chooses by the labelled validation split: the value `train.select` of the task."""
    return source_validator(select, task.selection[select])


def best_so_far(history: list[dict], validator: Validator) -> int | None:
    """The epoch (from 1) that is best by the validator; the earliest of equals.

    An undefined value (MCC of a network that calls everything the same) is never chosen; None
    if no epoch has a defined one yet.
    """
    place = best_of(history, validator)
    return None if place is None else history[place]["epoch"]


def best_epoch(history: list[dict], validator: Validator) -> int:
    """As `best_so_far` of a whole training. UserError if the value was never defined."""
    best = best_so_far(history, validator)
    if best is None and validator.measure is None:
        raise UserError(
            f"train.select={validator.key.removeprefix('val_')} was undefined on the validation "
            "split in every epoch; choose train.select=loss and another --workdir"
        )
    return choose(history, validator)["epoch"]


def check_validation(select: str, task: Task, target: Array) -> None:
    """UserError where no epoch could be chosen by `select` on the validation `target`.

    Args:
      select: `train.select`, one of `task.selection`.
      task: of the run.
      target: of the validation split, as in `catalog.Split`.
    """
    if task.name in ("multilabel", "regress"):
        reason = _lacking_values(select, task, np.asarray(target))
    else:
        reason = _lacking_classes(select, task, target)
    if reason:
        other = "" if select == "loss" else "; choose train.select=loss"
        raise UserError(f"train.select={select} is undefined: the validation split {reason}{other}")


def _lacking_classes(select: str, task: Task, target: Array) -> str:
    """Why the classes of images or pixels do not define `select`; empty where they do."""
    if select not in _OF_EVERY_CLASS + _OF_TWO_CLASSES:
        return ""
    present = count_labels(target, len(task.classes)) > 0
    if select in _OF_TWO_CLASSES:
        return "" if present.sum() > 1 else "has images of one class only"
    # The background of masks is not scored.
    scored = range(int(task.name == "segment"), len(present))
    absent = [task.classes[i] for i in scored if not present[i]]
    noun = "pixel" if task.name == "segment" else "image"
    return f"has no {noun} of {absent[0]}" if absent else ""


def _lacking_values(select: str, task: Task, target: np.ndarray) -> str:
    """Why the known findings or numbers `[n, k]` do not define `select`; empty where they do."""
    if task.name == "multilabel":
        present, absent = (target == 1).any(axis=0), (target == 0).any(axis=0)
        if (target == MISSING).all():
            return "has no known label"
        if select in _OF_RANKS and not (present & absent).any():
            return "has no finding that some images have and others have not"
        return "has no image with a finding" if select == "f1" and not present.any() else ""
    for name, column in zip(task.classes, target.T, strict=True):
        known = column[~np.isnan(column)]
        if select != "loss" and not known.size:
            return f"has no known value of {name}"
        if select in _OF_TWO_VALUES and np.ptp(known) == 0:
            return f"has one value of {name} only"
    return "has no known value" if np.isnan(target).all() else ""
