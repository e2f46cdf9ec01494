"""Losses of the tasks, each `(out, batch, params, anchor) -> (masked sum, count)`.

`out` is what the network gave, with its `logits`; `batch` holds `label` and, where the batch
is padded, `mask`; `anchor` is the pretrained state for terms that hold on to it. One place
(`training.step`) divides the sums, so that padding and devices cannot change the mean.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from medtl_jax.errors import UserError

LossTerm = Callable[..., tuple[jax.Array, jax.Array]]


def class_weights(labels: np.ndarray, num_classes: int, mode: str) -> np.ndarray:
    """float32 `[num_classes]`: ones, or `n / (num_classes * n_c)` for `mode="balanced"`."""
    if mode == "none":
        return np.ones(num_classes, np.float32)
    if mode != "balanced":
        raise UserError(f"train.class_weights={mode!r} is not known; choose 'none' or 'balanced'")
    counts = np.bincount(labels, minlength=num_classes)
    if (counts == 0).any():
        raise UserError(
            "train.class_weights=balanced needs training images of every class; class "
            f"{int(np.argmin(counts))} has none"
        )
    return (len(labels) / (num_classes * counts)).astype(np.float32)


def cross_entropy(weights: np.ndarray, label_smoothing: float, output: str = "logits") -> LossTerm:
    """The term of softmax cross-entropy, in nats.

    Args:
      weights: float32 `[classes]`; an example counts with the weight of its class, so the mean
        is over weights, as in torch.
      output: the entry of `out` to score: `logits`, or those of an auxiliary head.
      label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016).
    """
    if not 0 <= label_smoothing < 1:
        raise UserError(f"train.label_smoothing={label_smoothing} must lie in 0 <= s < 1")

    def term(out, batch, params, anchor):
        del params, anchor
        logits = out[output]
        log_probability = jax.nn.log_softmax(logits)
        target = jax.nn.one_hot(batch["label"], logits.shape[-1])
        target = target * (1 - label_smoothing) + label_smoothing / logits.shape[-1]
        weight = jnp.asarray(weights)[batch["label"]]
        if "mask" in batch:
            weight = jnp.where(batch["mask"], weight, 0.0)
        return -(target * log_probability).sum(-1) @ weight, weight.sum()

    return term
