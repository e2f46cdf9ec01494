"""L_pre of L_total = alpha L_pre + beta L_new: what holds a network to its pretrained state.

The source paper's update (RJCSE 4(2), 2023): `W_pre -= eta grad(alpha L_pre + beta L_new)` and
`W_new -= eta grad(beta L_new)`. Each term here is a function of the pretrained stages alone: of
their parameters, their maps and features, or the logits of the classifier that came with the
weights. A head, a decoder or an auxiliary head on top of them gets a gradient of exactly 0. (A
stage that is drawn anew in the midst of pretrained ones would get one from all but `l2sp`.)

Besides what `objectives.losses` says of a term's arguments:

- `anchor`: `{"params", "batch_stats"}` of the pretrained network before training;
- `batch["teacher"]`: the `out` of that network, in evaluation mode, of the same images;
- `batch["source"]`: a batch of the set that the weights were trained on, with its `target` and
  with the `out` of the network in training;
- `out["source_logits"]`: float32 `[b, k]`, of the pretrained classifier.

In training mode a batch norm uses the statistics of its batch, the teacher the stored ones, so
terms that compare the two are not 0 before the first update.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from medtl_jax.data.catalog import Array
from medtl_jax.errors import UserError
from medtl_jax.objectives.cotuning import cotuning
from medtl_jax.objectives.delta import delta
from medtl_jax.objectives.losses import LossTerm
from medtl_jax.objectives.retention import bss, l2sp, lwf, replay
from medtl_jax.objectives.sums import parse_sum
from medtl_jax.objectives.task import Task
from medtl_jax.transfer.optim import Schedule

ANCHOR, TEACHER, SOURCE_HEAD, SOURCE_DATA = "anchor", "teacher", "source_head", "source_data"

NEEDS = {
    "l2sp": frozenset({ANCHOR}),
    "delta": frozenset({ANCHOR, TEACHER}),
    "lwf": frozenset({ANCHOR, TEACHER, SOURCE_HEAD}),
    "replay": frozenset({SOURCE_HEAD, SOURCE_DATA}),
    "cotuning": frozenset({SOURCE_HEAD}),
    "bss": frozenset(),
}
"""What each loss asks for: the pretrained values, what they make of the batch, the pretrained
classifier, images of the source."""

SCHEDULES = ("constant", "linear", "cosine", "ramp")


def parse_pretrain_loss(text: str) -> tuple[tuple[float, str], ...]:
    """`(factor, name)` of each loss in `transfer.pretrain_loss`; none for `none`.

    >>> parse_pretrain_loss("l2sp + 0.1*bss")
    ((1.0, 'l2sp'), (0.1, 'bss'))

    Grammar and errors are those of `sums.parse_sum`.
    """
    return parse_sum("transfer.pretrain_loss", text, NEEDS, "l2sp + 0.1*bss")


def needs(text: str) -> frozenset[str]:
    """What `transfer.pretrain_loss=text` asks for, see `NEEDS`. UserError as the parser."""
    return frozenset().union(*(NEEDS[name] for _, name in parse_pretrain_loss(text)))


def check_pretrain(
    transfer: Mapping, has_weights: bool, has_source_head: bool, has_source_data: bool
) -> None:
    """UserError unless `config.transfer` asks for an L_pre that can be had.

    Args:
      transfer: `config.transfer`.
      has_weights: the network starts from pretrained weights.
      has_source_head: these weights have a classifier of their own.
      has_source_data: `transfer.source` names the set that they were trained on.
    """
    setting, alpha = f"transfer.pretrain_loss={transfer['pretrain_loss']}", transfer["alpha"]
    parts = parse_pretrain_loss(transfer["pretrain_loss"])
    if not 0 <= alpha < math.inf:
        raise UserError(f"transfer.alpha={alpha} must be a finite number of at least 0")
    for key in ("beta", "temperature"):
        if not 0 < transfer[key] < math.inf:
            raise UserError(f"transfer.{key}={transfer[key]} must be a positive finite number")
    for key in ("alpha_schedule", "beta_schedule"):
        if transfer[key] not in SCHEDULES:
            raise UserError(
                f"transfer.{key}={transfer[key]!r} is not known; choose from {', '.join(SCHEDULES)}"
            )
    if alpha and not parts:
        raise UserError(
            f"transfer.alpha={alpha} has no effect with {setting}; set alpha to 0, or "
            f"pretrain_loss to one or several of {', '.join(NEEDS)}"
        )
    if parts and not alpha:
        raise UserError(
            f"{setting} has no effect with transfer.alpha=0; set alpha above 0, or pretrain_loss "
            "to none"
        )
    for _, name in parts:
        if NEEDS[name] and not has_weights:
            raise UserError(
                f"{setting}: {name} holds on to pretrained weights, but the network has none; set "
                "model.weights, or leave the loss out"
            )
        if SOURCE_DATA in NEEDS[name] and not has_source_data:
            raise UserError(
                f"{setting}: {name} needs images that the weights were trained on; set "
                "transfer.source.name (and dir), or leave the loss out"
            )
        if SOURCE_HEAD in NEEDS[name] and not has_source_head:
            raise UserError(
                f"{setting}: {name} needs the classifier of the pretrained network, and "
                "model.weights hold none; choose weights that do, or l2sp or delta"
            )


def weight_schedule(kind: str, value: float | jax.Array, total_steps: int) -> float | Schedule:
    """The weight of a loss: a number if `constant`, else a float32 function of the step from 0.

    `linear` and `cosine` (half a period) fall from `value` at the first step to 0 at the last,
    `ramp` rises in a line from 0 to `value`. UserError for another kind.
    """
    if kind not in SCHEDULES:
        raise UserError(f"the schedule {kind!r} is not known; choose from {', '.join(SCHEDULES)}")
    if kind == "constant":
        return value if isinstance(value, jax.Array) else float(value)

    def weight(step):
        passed = jnp.asarray(step, jnp.float32) / max(total_steps - 1, 1)
        passed = jnp.clip(passed, 0.0, 1.0)
        if kind == "cosine":
            return value * (0.5 + 0.5 * jnp.cos(jnp.pi * passed))
        return value * (passed if kind == "ramp" else 1.0 - passed)

    return weight


def make_pretrain_term(
    text: str,
    *,
    anchored: tuple[str, ...],
    source: Task | None = None,
    source_terms: Mapping[str, LossTerm] | None = None,
    temperature: float = 2.0,
    importance: Mapping[str, Array] | None = None,
    relation: Array | None = None,
) -> LossTerm:
    """The term of L_pre: the sum of the named losses, each a mean times its factor. Its count is 1.

    Args:
      text: `transfer.pretrain_loss`, not `none`.
      anchored: the pretrained stages that train.
      source: the task of the pretrained classifier, for `lwf`.
      source_terms: for `replay`, `task.make_terms` of the source set.
      temperature: of `lwf`.
      importance: for `delta`, from `delta.channel_importance`.
      relation: for `cotuning`, from `cotuning.class_relation`.

    Raises:
      ValueError: an argument is missing.
    """
    asked = parse_pretrain_loss(text)
    given = {"lwf": source, "replay": source_terms, "cotuning": relation}
    absent = [name for _, name in asked if name in given and given[name] is None]
    if absent or not asked:
        raise ValueError(f"pretrain_loss={text!r}: nothing given for {', '.join(absent) or 'it'}")
    make = {
        "l2sp": lambda: l2sp(anchored),
        "delta": lambda: delta(anchored, importance),
        "lwf": lambda: lwf(source, temperature),
        "replay": lambda: replay(source_terms["logits"]),
        "cotuning": lambda: cotuning(relation),
        "bss": lambda: bss,
    }
    parts = tuple((factor, make[name]()) for factor, name in asked)

    def term(out, batch, params, anchor):
        total = jnp.zeros(())
        for factor, part in parts:
            value, count = part(out, batch, params, anchor)
            total = total + factor * value / jnp.maximum(count, 1e-12)
        return total, jnp.ones(())

    return term
