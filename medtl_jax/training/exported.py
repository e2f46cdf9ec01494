"""A trained network as one StableHLO program from stored pixels to scores: `jax.export`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from medtl_jax.models.registry import ModelSpec
from medtl_jax.objectives.losses import ordinal_log_probabilities
from medtl_jax.objectives.task import Task
from medtl_jax.training.step import eval_step

PLATFORMS = ("cpu", "cuda", "tpu")
"""What the program is lowered for; each has its own form of the convolutions in it."""


def export_scores(
    network: nn.Module,
    spec: ModelSpec,
    variables,
    task: Task,
    shape: tuple[int, int, int, int],
) -> jax.export.Exported:
    """The program `images uint8 [b, h, w, c] -> scores float32`, its weights inside.

    Normalisation, contrast and the task's own last step are part of it; scores are as
    `report.predict.Predictions` has them, those of a segmentation in float32.

    Args:
      network, spec: of the run.
      variables: params and batch statistics, of one domain.
      task: what the outputs stand for.
      shape: `[b, h, w, c]` of the images, all four fixed: how convolutions are computed depends on
        them.
    """
    variables = jax.tree.map(np.asarray, variables)

    def scores(images: jax.Array) -> jax.Array:
        # XLA would fold what it makes of the weights alone, and round otherwise than the run did.
        kept = jax.lax.optimization_barrier(variables)
        return task_scores(eval_step(kept, images, model=network, spec=spec), task)

    program = jax.export.export(jax.jit(scores), platforms=PLATFORMS)
    return program(jax.ShapeDtypeStruct(shape, jnp.uint8))


def task_scores(logits: jax.Array, task: Task) -> jax.Array:
    """`Task.score` of logits `[n, ...]` within a program, float32."""
    logits = logits.astype(jnp.float32)
    if task.name == "regress":
        return logits * jnp.float32(task.std) + jnp.float32(task.mean)
    if task.name == "multilabel":
        return jax.nn.sigmoid(logits)
    if task.name == "ordinal":
        return jnp.exp(ordinal_log_probabilities(logits, task.ordinal))
    return jax.nn.softmax(logits, axis=-1)


def call_in_batches(program: jax.export.Exported, images: np.ndarray) -> np.ndarray:
    """The scores of images uint8 `[n, h, w, c]`, the last batch padded with black ones."""
    (aval,) = program.in_avals
    size = aval.shape[0]
    padding = np.zeros((-len(images) % size, *aval.shape[1:]), np.uint8)
    padded = np.concatenate([images, padding])
    parts = [np.asarray(program.call(part)) for part in np.split(padded, len(padded) // size)]
    return np.concatenate(parts)[: len(images)]
