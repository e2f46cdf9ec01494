"""Logits of a whole split, each example exactly once."""

from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
from scipy.special import log_softmax

from medtl_jax.data.loader import evaluation_batches
from medtl_jax.models.registry import ModelSpec
from medtl_jax.training.devices import DataMesh
from medtl_jax.training.step import eval_step

Predict = Callable[[dict, jax.Array], np.ndarray]


def make_predict(model: nn.Module, spec: ModelSpec, mesh: DataMesh, batch_size: int) -> Predict:
    """`fn(variables, images uint8 [n, h, w, c]) -> float32 logits [n, classes]`.

    The last batch is padded and its padding thrown away, so one compiled program serves every
    split. Images may be a NumPy array or lie on the device.
    """

    def step(variables, images, indices):
        return eval_step(variables, images[indices], model=model, spec=spec)

    step = jax.jit(step, out_shardings=mesh.replicated)

    def predict(variables, images):
        images = jax.device_put(images, mesh.replicated)
        batches = evaluation_batches(len(images), batch_size)
        logits = [
            step(variables, images, jax.device_put(row, mesh.batched)) for row in batches.indices
        ]
        return np.concatenate([np.asarray(part) for part in logits])[batches.mask.ravel()]

    return predict


def probabilities(logits: np.ndarray) -> np.ndarray:
    """float64 softmax `[n, classes]` of logits."""
    return np.exp(log_softmax(logits.astype(np.float64), axis=-1))


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy of labels `[n]` in nats."""
    losses = -log_softmax(logits.astype(np.float64), axis=-1)[np.arange(len(labels)), labels]
    return float(losses.mean())
