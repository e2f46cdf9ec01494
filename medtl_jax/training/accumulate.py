"""The gradient of a batch in parts, one after the other: the memory is that of one part."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from medtl_jax.augment.mix import mixed_loss

Tree = Any
# `((loss, (batch_stats, logs)), gradients)` of batch statistics, a batch and a key.
Gradients = Callable[[Tree, Mapping[str, Any], jax.Array], tuple]


def accumulated(
    gradients: Gradients, batch_stats: Tree, batch: Mapping[str, Any], key: jax.Array, count: int
) -> tuple:
    """What `gradients` returns: loss, logs and gradients are the means over `count` equal parts.

    Each part moves the batch statistics that the one before it has left, and has a key of its own.
    On CPU the parts are written out one after the other, as convolutions are slow in a scan there.
    The mean is plain: where a loss is a sum over a count that differs between the parts,
    `gradients` divides by `shares`.

    Args:
      gradients: of one part.
      batch_stats: before the first part.
      batch: arrays `[b, ...]`, or of no axis, which all parts share. b is a multiple of `count`.
      key: of the step.
      count: of parts; part j has the rows i with `i % count == j`, so that every device keeps its
        rows of a batch that is divided over several.
    """
    size = batch["image"].shape[0]

    def part(number) -> dict[str, Any]:
        return jax.tree.map(lambda leaf: _rows(leaf, size, count)[number], dict(batch))

    def add(carry, number):
        batch_stats, totals = carry
        own, rows = jax.random.fold_in(key, number), part(number)
        rows["image"] = _after(totals, rows["image"])
        (value, (batch_stats, logs)), found = gradients(batch_stats, rows, own)
        return (batch_stats, jax.tree.map(jnp.add, totals, (value, logs, found))), None

    (value, (_, logs)), found = jax.eval_shape(lambda: gradients(batch_stats, part(0), key))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (value, logs, found))
    carry = batch_stats, zeros
    if jax.default_backend() == "cpu":
        for number in range(count):
            carry, _ = add(carry, number)
    else:
        carry, _ = jax.lax.scan(add, carry, jnp.arange(count))
    batch_stats, totals = carry
    value, logs, found = jax.tree.map(lambda leaf: leaf / count, totals)
    return (value, (batch_stats, logs)), found


def shares(
    terms: Sequence[Callable | None], shapes: Tree, batch: Mapping, params, anchor, count: int
) -> list[jax.Array | None]:
    """For each term its count in the whole batch over `count`, the number of parts.

    Divided by it, the sums of the parts have the mean of the whole batch as their mean, however
    many entries a part has. The counts depend on the batch alone, so the network is not run.

    Args:
      terms: of `objectives.losses`; None for one whose parts have their own counts, and stays so.
      shapes: of the network's `out` for the whole batch.
      batch: augmented and mixed.
      params, anchor: as a term has them.
    """
    out = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return [
        None if term is None else mixed_loss(term, out, batch, params, anchor)[1] / count
        for term in terms
    ]


def _after(totals: Tree, image: jax.Array) -> jax.Array:
    """The image, to be had once `totals` are there: else XLA holds several parts at once.

    Its compiler for CPU removes `lax.optimization_barrier`. It cannot know that no total is NaN;
    where one is, the step is lost in any case.
    """
    last = sum(leaf.ravel()[0] for leaf in jax.tree.leaves(totals))
    return jnp.where(jnp.isnan(last), jnp.nan, image)


def _rows(leaf: jax.Array, size: int, count: int) -> jax.Array:
    """`[count, size / count, ...]`; what has no axis is repeated, `[count]`."""
    if leaf.ndim == 0:
        return jnp.broadcast_to(leaf, (count,))
    return leaf.reshape(size // count, count, *leaf.shape[1:]).swapaxes(0, 1)
