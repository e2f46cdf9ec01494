"""Choosing an epoch or a method for a target domain whose labels nobody may use.

A validator is a number that rates a network without target labels: one of `VALIDATORS`, which
`domain.validators` works out on unlabelled target images, or `source_validator`, a value on the
source's validation split.

What target labels say is stored under names that begin with `ORACLE`, to be shown beside the rest.
No validator can have such a name, so that nothing can be chosen by it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from medtl_jax.domain.validators import dev, entropy, infomax, snd
from medtl_jax.errors import UserError

# How the name of a number begins that was found with target labels.
ORACLE = "oracle"
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What validators read of one network; None where it was not computed.

    Attributes:
      target_probabilities: of unlabelled target images, as `validators.distributions` gives them.
      target_features: `[m, d]`, of unlabelled target images.
      source_train_features: `[n, d]`, of source training images.
      source_features: `[v, d]`, of source validation images.
      source_losses: `[v]`, the loss of each of them.
    """

    target_probabilities: np.ndarray | None = None
    target_features: np.ndarray | None = None
    source_train_features: np.ndarray | None = None
    source_features: np.ndarray | None = None
    source_losses: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Validator:
    """A number to choose by, which needs no target label.

    Attributes:
      name: as the user gives it.
      key: of its value in a record of an epoch or of a method.
      more_is_better: what the best is.
      summary: what it is, for a report.
      needs: the fields of `Evidence` that `measure` reads; none where the value is in the record
        anyway.
      measure: the value of an `Evidence`; None where it is in the record anyway.

    Raises:
      ValueError: name or key begin with `ORACLE`: such a number was found with target labels.
    """

    name: str
    key: str
    more_is_better: bool
    summary: str
    needs: tuple[str, ...] = ()
    measure: Callable[[Evidence], float] | None = None

    def __post_init__(self):
        for text in (self.name, self.key):
            if text.casefold().lstrip("_ ").startswith(ORACLE):
                raise ValueError(f"{text!r} was found with target labels: nothing is chosen by it")


def _of_probabilities(
    name: str, more_is_better: bool, summary: str, measure: Callable[[np.ndarray], float]
) -> Validator:
    return Validator(
        name,
        f"target_{name}",
        more_is_better,
        summary,
        ("target_probabilities",),
        lambda evidence: measure(evidence.target_probabilities),
    )


def _dev(evidence: Evidence) -> float:
    return dev(
        evidence.source_train_features,
        evidence.source_features,
        evidence.source_losses,
        evidence.target_features,
    )


VALIDATORS = {
    found.name: found
    for found in (
        _of_probabilities(
            "entropy", False, "mean entropy of the predictions on target images", entropy
        ),
        _of_probabilities(
            "infomax", True, "mutual information of target images and predictions", infomax
        ),
        _of_probabilities("snd", True, "soft neighbourhood density of target predictions", snd),
        Validator(
            "dev",
            "target_dev",
            False,
            "loss on the source's validation split, weighted towards the target",
            ("source_train_features", "source_features", "source_losses", "target_features"),
            _dev,
        ),
    )
}
SOURCE = "source"


def source_validator(select: str, more_is_better: bool) -> Validator:
    """Returns the validator that is `val_<select>` of the labelled source's validation split."""
    return Validator(SOURCE, f"val_{select}", more_is_better, f"validation {select}")


def find_validator(name: str, source: Validator, task: str) -> Validator:
    """Returns the validator of a name.

    Args:
      name: `source`, or one of `VALIDATORS`.
      source: see `source_validator`.
      task: one of `catalog.TASKS`.

    Raises:
      UserError: there is none of this name for the task.
    """
    known = {source.name: source, **VALIDATORS}
    lacking = {key: _lacking(found, task) for key, found in known.items()}
    fitting = [key for key, reason in lacking.items() if not reason]
    if name in fitting:
        return known[name]
    why = f"there is no validator '{name}'"
    if name in known:
        why = f"the validator '{name}' needs {lacking[name]}"
    elif name.casefold().startswith(ORACLE):
        why = f"'{name}' uses target labels, and nothing may be chosen by them"
    raise UserError(f"{why}: choose from {', '.join(fitting)}")


def _lacking(validator: Validator, task: str) -> str:
    """What a validator needs and the task has not; empty where it has all."""
    if task == "regress" and "target_probabilities" in validator.needs:
        return f"probabilities, which task={task} does not predict"
    if task != "classify" and "source_losses" in validator.needs:
        return f"the log loss of one class an image, which task={task} has not"
    return ""


def measure(evidence: Evidence, validators: Iterable[Validator]) -> dict[str, float | None]:
    """Returns the values of validators by their `key`, for a record; None of what is not finite.

    One whose value is in the record anyway is left out.

    Raises:
      ValueError: `evidence` lacks what a validator needs.
    """
    values = {}
    for validator in validators:
        if validator.measure is None:
            continue
        lacking = [name for name in validator.needs if getattr(evidence, name) is None]
        if lacking:
            raise ValueError(f"the validator {validator.name} needs {', '.join(lacking)}")
        value = validator.measure(evidence)
        values[validator.key] = value if math.isfinite(value) else None
    return values


def best_of(records: Sequence[Record], validator: Validator) -> int | None:
    """Returns the place of the record that is best by a validator, the earlier of equal ones.

    A value that is None, NaN or infinite is never chosen; None where there is no other.

    Args:
      records: of epochs or of methods, in their order, each with `validator.key`.
      validator: what to choose by.

    Raises:
      KeyError: a record lacks the value.
    """
    sign = 1 if validator.more_is_better else -1
    values = [record[validator.key] for record in records]
    finite = [i for i, value in enumerate(values) if value is not None and math.isfinite(value)]
    return max(finite, key=lambda i: (sign * values[i], -i), default=None)


def choose(records: Sequence[Record], validator: Validator) -> Record:
    """Returns the record that is best by a validator, as `best_of` has it.

    Raises:
      UserError: no record has a finite value.
    """
    best = best_of(records, validator)
    if best is None:
        raise UserError(
            f"the validator {validator.name} has no finite value in any of {len(records)} records: "
            "choose another validator, or lower the learning rate where the training diverged"
        )
    return records[best]
