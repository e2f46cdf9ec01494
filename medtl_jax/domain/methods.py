"""From `domain.method` to the loss terms of an adaptation."""

import functools
from collections.abc import Mapping
from typing import Any

import jax

from medtl_jax.domain.adversary import Adversary, Discriminator, MapDiscriminator, cdan, dann
from medtl_jax.domain.alignment import (
    align_coral,
    align_mmd,
    check_reads,
    minimize_confusion,
    minimize_entropy,
)
from medtl_jax.errors import UserError
from medtl_jax.models.backbone import FEATURES
from medtl_jax.objectives.losses import LossTerm, ordinal_log_probabilities
from medtl_jax.objectives.sums import parse_sum
from medtl_jax.objectives.task import Task

# For which tasks: what reads features alone is for all, what reads answers is not.
_ANY = ("classify", "multilabel", "ordinal", "segment", "regress")
_RANKED = ("classify", "ordinal")
# For which one answer is a distribution over the classes.
_DISTRIBUTIONS = (*_RANKED, "segment")
METHODS: dict[str, tuple[str, ...]] = {
    "dann": _ANY,
    "cdan": _RANKED,
    "cdan_e": _RANKED,
    "mmd": _ANY,
    "coral": _ANY,
    "mcc": _RANKED,
    "entropy": _DISTRIBUTIONS,
}
"""Names for `domain.method`, and the tasks that each is for."""
ADVERSARIAL = ("dann", "cdan", "cdan_e")
"""Those with a discriminator."""
READERS = ("dann", "mmd", "coral")
"""Those that read the entry of the network's `out` that `domain.reads` names."""


def parse_method(text: str) -> tuple[tuple[float, str], ...]:
    """`(factor, name)` of each loss in `domain.method`; none for `none`.

    >>> parse_method("cdan_e + 0.1*mcc")
    ((1.0, 'cdan_e'), (0.1, 'mcc'))

    Raises:
      UserError: as `sums.parse_sum`; two losses with a discriminator.
    """
    found = parse_sum("domain.method", text, METHODS, "cdan_e + 0.1*mcc")
    against = [name for _, name in found if name in ADVERSARIAL]
    if len(against) > 1:
        raise UserError(
            f"domain.method={text!r}: {' and '.join(against)} want a discriminator each, and there "
            "is one: name one of them"
        )
    return found


def check_method(text: str, task: str, reads: str = "") -> None:
    """UserError for a `domain.method` that is none, or not for the task and what it `reads`."""
    for _, name in parse_method(text):
        if task not in METHODS[name]:
            able = ", ".join(other for other, tasks in METHODS.items() if task in tasks)
            raise UserError(
                f"domain.method={text!r}: {name} is not for task={task}; choose from {able}"
            )
        if name == "dann" and reads == "logits" and task not in _DISTRIBUTIONS:
            raise UserError(
                f"domain.reads=logits: dann reads them as the probabilities of classes, which "
                f'task={task} has not; set domain.reads="" for the features, or to a stage'
            )


def make_domain_terms(
    text: str, task: Task, out: Mapping[str, Any], reads: str = "", width: int = 1024
) -> tuple[tuple[float, LossTerm], ...]:
    """`(factor, term)` of each loss in `domain.method`; the one with a discriminator first.

    Args:
      text: `domain.method`.
      task: of the network.
      out: the network's, with its `logits`; arrays or `jax.ShapeDtypeStruct`s.
      reads: the entry of `out` that dann, mmd and coral look at, `""` for the features.
      width: of the discriminator's hidden layers; one that reads a map has its own.

    Raises:
      UserError: as `check_method`; `out` has no such entry.
    """
    check_method(text, task.name, reads)
    reads = reads or FEATURES
    check_reads(out, [reads])
    answers = jax.nn.log_softmax
    if task.name == "ordinal":
        answers = functools.partial(ordinal_log_probabilities, kind=task.ordinal)
    judge = MapDiscriminator() if len(out[reads].shape) == 4 else Discriminator(width)
    make = {
        "dann": lambda: dann(judge, reads, answers),
        "cdan": lambda: cdan(
            Discriminator(width), entropy_weights=False, log_probabilities=answers
        ),
        "cdan_e": lambda: cdan(
            Discriminator(width), entropy_weights=True, log_probabilities=answers
        ),
        "mmd": lambda: align_mmd([reads]),
        "coral": lambda: align_coral([reads]),
        "mcc": lambda: minimize_confusion(log_probabilities=answers),
        "entropy": lambda: minimize_entropy(answers),
    }
    terms = [(factor, make[name]()) for factor, name in parse_method(text)]
    return tuple(sorted(terms, key=lambda part: not isinstance(part[1], Adversary)))
