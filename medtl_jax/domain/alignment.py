"""Losses that bring the features or the answers of two domains together, without target labels.

Pure functions of arrays, and terms `(out, batch, params, anchor) -> (sum, count)` made of them,
see `objectives.losses`. What a term's arguments hold besides:

- `out`, `batch`: of the labelled batch of the source;
- `batch["target_domain"]`: `{"image", "out"}` of an unlabelled batch of the target, `out` as the
  network in training gives it, and `mask` `[b]` where the batch is padded. The two batches may
  have different sizes;
- `batch["adaptation"]`: float32 `[]`, the strength, see `adversary.ramp`. The terms here are
  multiplied by it: at 0 nothing they depend on learns from them.

Each gives a mean over its batches as the sum, and 1 as the count.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from medtl_jax.errors import UserError
from medtl_jax.objectives.losses import LossTerm

TARGET_DOMAIN, ADAPTATION = "target_domain", "adaptation"

# Logits `[..., k']` -> log-probabilities `[..., k]`.
LogProbabilities = Callable[[jax.Array], jax.Array]


def check_reads(out: Mapping[str, Any], reads: Sequence[str]) -> None:
    """UserError for a name in `reads` that is no entry of the network's `out`, or for none."""
    absent = [name for name in reads if name not in out]
    if absent or not reads:
        raise UserError(
            f"adaptation cannot read {', '.join(map(repr, absent)) or 'nothing'} of the network; "
            f"choose from {', '.join(out)}"
        )


def rows(out: Mapping[str, jax.Array], name: str) -> jax.Array:
    """float32 `[b, d]`: an entry of `out`, a map `[b, h, w, d]` averaged over its positions."""
    x = out[name].astype(jnp.float32)
    return x.mean((1, 2)) if x.ndim == 4 else x


def counted(batch: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """float32 `[b]`: 1 for each example of `x` `[b, ...]`, 0 for padding."""
    return batch["mask"].astype(jnp.float32) if "mask" in batch else jnp.ones(len(x))


def weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """The mean of `values` `[b, ...]` with a weight `[b]` of each example; 0 where all are 0.

    The sum of the weights has no gradient.
    """
    weight = jnp.broadcast_to(weight.reshape(-1, *(1,) * (values.ndim - 1)), values.shape)
    return (weight * values).sum() / jax.lax.stop_gradient(jnp.maximum(weight.sum(), 1e-12))


def entropy(log_probability: jax.Array) -> jax.Array:
    """`[...]`, in nats, of log-probabilities `[..., k]`."""
    return -(jnp.exp(log_probability) * log_probability).sum(-1)


def squared_distances(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`|x_i - x_j|^2` `[n, n]` of the rows of `x` `[n, d]`, none below 0.

    Rows of `weight` `[n]` 0 are taken as if they were the mean of the others.
    """
    # About the mean the products are no larger than the distances, and lose no digits to them.
    mean = jax.lax.stop_gradient(weight @ x / jnp.maximum(weight.sum(), 1e-12))
    x = jnp.where(weight[:, None] > 0, x - mean, 0.0)
    product = jnp.matmul(x, x.T, precision="highest")
    square = jnp.square(x).sum(-1)
    return jnp.maximum(square[:, None] + square[None] - 2 * product, 0.0)


def median_of_pairs(distances: jax.Array, weight: jax.Array) -> jax.Array:
    """The median of `distances` `[n, n]` over the pairs of different rows of weight above 0.

    It has no gradient. 0 where there are no two such rows.
    """
    real = weight > 0
    pairs = real[:, None] & real[None] & ~jnp.eye(len(weight), dtype=bool)
    ordered = jnp.sort(jnp.where(pairs, jax.lax.stop_gradient(distances), jnp.inf), axis=None)
    count = pairs.sum()
    middle = ordered[jnp.maximum(count - 1, 0) // 2] + ordered[count // 2]
    return jnp.where(count > 0, middle / 2, 0.0)


def multi_kernel_mmd(
    source: jax.Array,
    target: jax.Array,
    source_weight: jax.Array | None = None,
    target_weight: jax.Array | None = None,
    *,
    widths: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0),
) -> jax.Array:
    """The squared maximum mean discrepancy of `[n, d]` and `[m, d]`, float32 `[]`, at least 0.

    The biased estimator (Gretton et al. 2012, equation 5), which is 0 for equal batches:
    `mean k(s, s') + mean k(t, t') - 2 mean k(s, t)`. The kernel is the mean of Gaussians
    `exp(-|x - y|^2 / (w m))` over the `widths` w (DAN, Long et al. 2015, with equal weights), m
    the median of the squared distances between all rows of both, which has no gradient.

    Args:
      source_weight, target_weight: `[n]` and `[m]`, of each row, such as 0 for padding; all 1 if
        they are not given.
    """
    ones = [jnp.ones(len(x)) for x in (source, target)]
    weights = [
        default if weight is None else weight
        for weight, default in zip((source_weight, target_weight), ones, strict=True)
    ]
    pooled = jnp.concatenate(weights)
    distances = squared_distances(jnp.concatenate([source, target]), pooled)
    # Where most rows are the same, the median is 0: the kernel then tells equal from not equal.
    median = jnp.maximum(median_of_pairs(distances, pooled), 1e-12)
    kernel = sum(jnp.exp(-distances / (width * median)) for width in widths) / len(widths)
    first, second = (weight / jnp.maximum(weight.sum(), 1e-12) for weight in weights)
    signed = jnp.concatenate([first, -second])
    return jnp.einsum("i,ij,j->", signed, kernel, signed, precision="highest")


def covariance(x: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """`[d, d]` of the rows of `x` `[n, d]` of weight 1, over n - 1; 0 for a single row.

    `weight` `[n]` is 1, or 0 for padding.
    """
    weight = jnp.ones(len(x)) if weight is None else weight
    x = jnp.where(weight[:, None] > 0, x, 0.0)
    count = weight.sum()
    x = (x - x.sum(0) / jnp.maximum(count, 1.0)) * weight[:, None]
    return jnp.matmul(x.T, x, precision="highest") / jnp.maximum(count - 1, 1.0)


def coral(
    source: jax.Array,
    target: jax.Array,
    source_weight: jax.Array | None = None,
    target_weight: jax.Array | None = None,
) -> jax.Array:
    """`|C_s - C_t|_F^2 / (4 d^2)` of the covariances of `[n, d]` and `[m, d]`, float32 `[]`.

    Deep CORAL (Sun & Saenko 2016, equation 1). It is 0 for equal batches. The weights are those of
    `covariance`.
    """
    difference = covariance(source, source_weight) - covariance(target, target_weight)
    return jnp.square(difference).sum() / (4 * source.shape[-1] ** 2)


def class_confusion(log_probability: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """Minimum class confusion (Jin et al. 2020) of log-probabilities `[n, k]`, float32 `[]`.

    With Y the probabilities and W_i, in proportion to `1 + exp(-entropy)` and n in sum, how much
    example i counts: `C = Y^T W Y`, each row of C divided by its sum, and of
    that the sum off the diagonal over k. Between 0, where every example has one class, and
    `(k - 1) / k`. W has no gradient.

    Args:
      log_probability: at the temperature T, of `log_softmax(logits / T)`.
      weight: `[n]`, 1, or 0 for padding, at least one of them 1; all 1 if it is not given.
    """
    weight = jnp.ones(len(log_probability)) if weight is None else weight
    certain = jnp.log(weight * (1 + jnp.exp(-jax.lax.stop_gradient(entropy(log_probability)))))
    # Row j of C sums to sum_i W_i Y_ij. Divided by it, W_i Y_ij is a softmax over the examples,
    # which stays finite for a class whose probabilities underflow everywhere.
    share = jax.nn.softmax(certain[:, None] + log_probability, axis=0)
    return (share * (1 - jnp.exp(log_probability))).sum() / log_probability.shape[1]


def align_mmd(reads: Sequence[str] = ("features",)) -> LossTerm:
    """The term of `multi_kernel_mmd`, summed over the entries `reads` of `out`, as DAN has it.

    A map is averaged over its positions.
    """
    return _align(multi_kernel_mmd, reads)


def align_coral(reads: Sequence[str] = ("features",)) -> LossTerm:
    """The term of `coral`, summed over the entries `reads` of `out`.

    A map is averaged over its positions.
    """
    return _align(coral, reads)


def minimize_confusion(
    temperature: float = 2.5, log_probabilities: LogProbabilities = jax.nn.log_softmax
) -> LossTerm:
    """The term of `class_confusion` of the target's logits `[b, k]` over the `temperature`."""

    def value(logits, weight):
        return class_confusion(log_probabilities(logits / temperature), weight)

    return _of_answers(value)


def minimize_entropy(log_probabilities: LogProbabilities = jax.nn.log_softmax) -> LossTerm:
    """The term of the mean entropy, in nats, of the answers to the target's images, or pixels.

    Entropy minimisation (Grandvalet & Bengio 2005). The logits are `[b, k]` or `[b, h, w, k]`.
    """

    def value(logits, weight):
        return weighted_mean(entropy(log_probabilities(logits)), weight)

    return _of_answers(value)


def _align(discrepancy: Callable[..., jax.Array], reads: Sequence[str]) -> LossTerm:
    reads = tuple(reads)

    def term(out, batch, params, anchor):
        del params, anchor
        total, target = jnp.zeros(()), batch[TARGET_DOMAIN]
        for name in reads:
            x, y = rows(out, name), rows(target["out"], name)
            total = total + discrepancy(x, y, counted(batch, x), counted(target, y))
        return batch[ADAPTATION] * total, jnp.ones(())

    return term


def _of_answers(value: Callable[[jax.Array, jax.Array], jax.Array]) -> LossTerm:
    def term(out, batch, params, anchor):
        del out, params, anchor
        target = batch[TARGET_DOMAIN]
        logits = target["out"]["logits"].astype(jnp.float32)
        return batch[ADAPTATION] * value(logits, counted(target, logits)), jnp.ones(())

    return term
