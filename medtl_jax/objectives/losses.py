"""Losses of the tasks, each `(out, batch, params, anchor) -> (masked sum, count)`.

`out` is what the network gave, with its `logits`; `batch` holds `target` and, where the batch
is padded, `mask` `[b]`; `anchor` is the pretrained state for terms that hold on to it. One place
(`training.step`) divides the sums, so that padding and devices cannot change the mean. What a
target and the logits of a task look like: `data.catalog.Split`, `objectives.task.Task`.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from medtl_jax.data.catalog import MISSING
from medtl_jax.errors import UserError

LossTerm = Callable[..., tuple[jax.Array, jax.Array]]

ORDINAL = ("corn", "cumulative")


def _counted(batch: Mapping[str, jax.Array], entries: jax.Array) -> jax.Array:
    """Those of the bool `entries` `[b, ...]` that belong to an example, not to padding."""
    if "mask" not in batch:
        return entries
    return entries & batch["mask"].reshape(-1, *(1,) * (entries.ndim - 1))


def _output(out: Mapping[str, jax.Array], output: str, shape: tuple[int, ...]) -> jax.Array:
    # A wrong shape would broadcast to a loss that looks like one.
    if out[output].shape != shape:
        raise ValueError(f"{output} are {out[output].shape}, the loss wants {shape}")
    return out[output]


def cross_entropy(
    weights: np.ndarray,
    label_smoothing: float | jax.Array = 0.0,
    output: str = "logits",
    *,
    focal_gamma: float = 0.0,
    adjustment: np.ndarray | None = None,
) -> LossTerm:
    """The term of softmax cross-entropy, in nats, over images or over pixels.

    Logits are `[..., k]` and targets int `[...]`, with `[b]` or `[b, h, w]` in front. With q the
    smoothed target and p the softmax, the loss of one entry is `-sum_c q_c (1 - p_c)^g log p_c`.

    Args:
      weights: float32 `[k]`; an entry counts with the weight of its class, so the mean is over
        weights, as in torch.
      label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016);
        a number, or a traced scalar whose range is the caller's to keep.
      output: the entry of `out` to score: `logits`, or those of an auxiliary head.
      focal_gamma: g above (Lin et al. 2017, equation 4); 0 is the cross-entropy.
      adjustment: float32 `[k]`, added to the logits here and nowhere else: `tau * log prior` of
        Menon et al. 2021, equation 10.
    """
    if not isinstance(label_smoothing, jax.Array) and not 0 <= label_smoothing < 1:
        raise UserError(f"train.label_smoothing={label_smoothing} must lie in 0 <= s < 1")
    classes = len(weights)

    def term(out, batch, params, anchor):
        del params, anchor
        labels = batch["target"]
        logits = _output(out, output, (*labels.shape, classes))
        if adjustment is not None:
            logits = logits + jnp.asarray(adjustment)
        log_probability = jax.nn.log_softmax(logits)
        target = jax.nn.one_hot(labels, classes)
        target = target * (1 - label_smoothing) + label_smoothing / classes
        if focal_gamma:
            # The floor keeps the slope of the power finite where p rounds to 1.
            others = jnp.maximum(-jnp.expm1(log_probability), 1e-12)
            target = target * others**focal_gamma
        weight = jnp.asarray(weights)[labels]
        weight = jnp.where(_counted(batch, jnp.ones(labels.shape, bool)), weight, 0.0)
        return -((target * log_probability).sum(-1) * weight).sum(), weight.sum()

    return term


def binary_cross_entropy(
    positive_weights: np.ndarray, output: str = "logits", *, focal_gamma: float = 0.0
) -> LossTerm:
    """The term of sigmoid cross-entropy over the findings that are known, in nats.

    Logits are `[b, k]`, targets int `[b, k]` of 1, 0 and `MISSING`. The count is of known entries,
    whatever their weights, as torch's `binary_cross_entropy_with_logits` divides.

    Args:
      positive_weights: float32 `[k]`, factor of a finding's loss where it is present.
      output: as in `cross_entropy`.
      focal_gamma: factor `(1 - p)^g` of the loss, p the probability given to the truth
        (Lin et al. 2017, equation 4, without its alpha).
    """

    def term(out, batch, params, anchor):
        del params, anchor
        target = batch["target"]
        logits = _output(out, output, target.shape)
        known = _counted(batch, target != MISSING)
        present = target == 1
        towards = jnp.where(present, logits, -logits)
        loss = -jax.nn.log_sigmoid(towards) * jnp.where(present, jnp.asarray(positive_weights), 1.0)
        if focal_gamma:
            loss = loss * jnp.exp(focal_gamma * jax.nn.log_sigmoid(-towards))
        return jnp.where(known, loss, 0.0).sum(), known.sum().astype(jnp.float32)

    return term


def ordinal_log_probabilities(logits: jax.Array, kind: str) -> jax.Array:
    """Log-probabilities `[..., k]` of the classes from logits z `[..., k - 1]`, float32.

    `corn` (Shi, Cao & Raschka 2023, CORN): `P(y > j | y > j - 1) = sigmoid(z_j)`, a class is the
    product of the steps taken and the one not taken.

    `cumulative` (cumulative link, McCullagh 1980): `P(y > j) = sigmoid(u_j)` with u_0 = z_0 and
    u_j = u_(j-1) - softplus(z_j), so that the thresholds are in order by construction. The gaps
    between them depend on the image, as the head computes them; in the proportional-odds model
    they would be constants.

    Both are proper distributions: no entry is negative, and each row sums to 1.
    """
    passed, stopped = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    none = jnp.zeros_like(logits[..., :1])
    if kind == "corn":
        above = jnp.concatenate([none, jnp.cumsum(passed, axis=-1)], axis=-1)
        return above + jnp.concatenate([stopped, none], axis=-1)
    gaps = jax.nn.softplus(logits[..., 1:])
    above = logits[..., :1] - jnp.concatenate([none, jnp.cumsum(gaps, axis=-1)], axis=-1)
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), and with
    # a - b = softplus(z) the last factor is sigmoid(z): no difference of near equals is taken.
    lower = jnp.concatenate([none, jax.nn.log_sigmoid(above)], axis=-1)
    upper = jnp.concatenate([jax.nn.log_sigmoid(-above), none], axis=-1)
    between = jnp.concatenate([none, passed[..., 1:], none], axis=-1)
    return lower + upper + between


def ordinal(weights: np.ndarray, kind: str, output: str = "logits") -> LossTerm:
    """The term of the negative log-likelihood of an ordered class, in nats.

    Logits are `[b, k - 1]`, targets int `[b]`. For `corn` this sum is that of the binary
    cross-entropies over the conditional subsets, and the count is of the subsets' members, as in
    the paper; for `cumulative` the count is of the examples.

    Args:
      weights: float32 `[k]`; an example counts with the weight of its class.
      kind: see `ordinal_log_probabilities`.
      output: as in `cross_entropy`.
    """
    classes = len(weights)

    def term(out, batch, params, anchor):
        del params, anchor
        labels = batch["target"]
        logits = _output(out, output, (*labels.shape, classes - 1))
        log_probability = ordinal_log_probabilities(logits, kind)
        loss = -(jax.nn.one_hot(labels, classes) * log_probability).sum(-1)
        weight = jnp.asarray(weights)[labels]
        weight = jnp.where(_counted(batch, jnp.ones(labels.shape, bool)), weight, 0.0)
        # Class y belongs to the subsets of the steps 0..y, of which there are k - 1.
        members = jnp.minimum(labels + 1, classes - 1).astype(jnp.float32)
        count = weight * members if kind == "corn" else weight
        return (loss * weight).sum(), count.sum()

    return term


def soft_dice(classes: int, output: str = "logits") -> LossTerm:
    """The term of one minus the soft Dice coefficient, summed over the classes that occur.

    Logits are `[b, h, w, k]`, targets int `[b, h, w]`. With p the softmax and t the truth (0 or
    1), the sums over all pixels of the batch: `D_c = 2 sum(p t) / (sum(p) + sum(t))`. Class 0,
    the background, is left out, and so is a class without a pixel in the whole batch: its D_c is
    0 whatever the network says (the cross-entropy beside this term punishes false alarms). An
    image without a mask only adds its p to the denominators of the batch. The count is of the
    classes that occur.
    """

    def term(out, batch, params, anchor):
        del params, anchor
        labels = batch["target"]
        logits = _output(out, output, (*labels.shape, classes))
        counted = _counted(batch, jnp.ones(labels.shape, bool))[..., None]
        probability = jnp.where(counted, jax.nn.softmax(logits), 0.0)[..., 1:]
        truth = jnp.where(counted, jax.nn.one_hot(labels, classes), 0.0)[..., 1:]
        pixels = truth.sum((0, 1, 2))
        overlap = (probability * truth).sum((0, 1, 2))
        occurs = pixels > 0
        dice = 2 * overlap / jnp.maximum(probability.sum((0, 1, 2)) + pixels, 1e-12)
        return jnp.where(occurs, 1 - dice, 0.0).sum(), occurs.sum().astype(jnp.float32)

    return term


def huber(
    mean: np.ndarray, std: np.ndarray, delta: float = 1.0, output: str = "logits"
) -> LossTerm:
    """The term of the Huber loss (1964) over the numbers that are known.

    Logits are `[b, k]`, in standard deviations about the mean; targets float32 `[b, k]` in their
    own units, NaN where unknown. With r the standardised error: `r^2 / 2` up to `delta`, then
    `delta (|r| - delta / 2)`. The count is of known entries.

    Args:
      mean, std: `[k]`, of the training targets.
      delta: in standard deviations.
      output: as in `cross_entropy`.
    """
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def term(out, batch, params, anchor):
        del params, anchor
        target = batch["target"]
        logits = _output(out, output, target.shape)
        known = _counted(batch, ~jnp.isnan(target))
        # NaN goes before the loss: behind it, `where` would still let it into the gradient.
        wanted = (jnp.where(known, target, jnp.asarray(mean)) - jnp.asarray(mean)) / std
        loss = optax.losses.huber_loss(logits, wanted, delta=delta)
        return jnp.where(known, loss, 0.0).sum(), known.sum().astype(jnp.float32)

    return term


def add(first: LossTerm, factor: float, second: LossTerm) -> LossTerm:
    """The term whose mean is that of `first` plus `factor` times that of `second`.

    Its count is the one of `first`.
    """

    def term(out, batch, params, anchor):
        value, count = first(out, batch, params, anchor)
        other, others = second(out, batch, params, anchor)
        return value + factor * count * other / jnp.maximum(others, 1e-12), count

    return term
