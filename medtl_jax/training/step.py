"""The train state, the one train step and the evaluation step: pure functions to be jitted."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from medtl_jax.augment.policy import Augment
from medtl_jax.errors import UserError
from medtl_jax.keys import named_key
from medtl_jax.models.inputs import normalize
from medtl_jax.models.registry import ModelSpec
from medtl_jax.objectives.task import LossTerm
from medtl_jax.transfer.groups import FROZEN, frozen_stages, stop_frozen
from medtl_jax.transfer.optim import group_norms

Tree = Any


@flax.struct.dataclass
class TrainState:
    """Everything that training changes; saved and restored as a whole.

    Attributes:
      step: int32, number of updates made.
      params, batch_stats: of the network.
      opt_state: of the optimizers of all groups.
      anchor: the pretrained state that an L_pre term holds on to, or None without such a term.
      ema: exponential moving average `{"params", "batch_stats"}`, or None when it is off.
      phase: int32, position in the list of training phases.
    """

    step: jax.Array
    params: Tree
    batch_stats: Tree
    opt_state: Tree
    anchor: Tree = None
    ema: Tree = None
    phase: jax.Array | int = 0


@dataclasses.dataclass(frozen=True)
class StepParts:
    """What a step is made of and training does not change.

    Attributes:
      model, spec: the network and what its input is.
      optimizer: over the whole parameter tree.
      table: stage -> group, from `groups.assign_stages`.
      terms: `(factor, term)` pairs whose means are added up to the loss.
      augment: on the raw image, before normalisation.
      ema_decay: of the moving average, 0 = off.
    """

    model: nn.Module
    spec: ModelSpec
    optimizer: optax.GradientTransformation
    table: Mapping[str, str]
    terms: tuple[tuple[float, LossTerm], ...]
    augment: Augment
    ema_decay: float = 0.0

    def __post_init__(self):
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"train.ema={self.ema_decay} must lie in 0 <= decay < 1")


def create_state(variables: Tree, parts: StepParts) -> TrainState:
    """The state before the first step. The optimizer sees the pretrained values."""
    ema = jax.tree.map(jnp.copy, dict(variables)) if parts.ema_decay else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=parts.optimizer.init(variables["params"]),
        ema=ema,
        phase=jnp.zeros((), jnp.int32),
    )


def evaluation_variables(state: TrainState) -> Tree:
    """`{"params", "batch_stats"}` to evaluate with: the moving average where there is one."""
    return state.ema or {"params": state.params, "batch_stats": state.batch_stats}


def _moving_average(
    ema: Tree, new: Tree, decay: float, step: jax.Array, table: Mapping[str, str]
) -> Tree:
    # Early on the average would be dominated by the start; this is the usual warm-up of the
    # decay (Abadi et al. 2015, ExponentialMovingAverage with num_updates).
    count = step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1.0 + count) / (10.0 + count))

    def average(old, value):
        return old + (1 - decay) * (value - old)

    # A frozen leaf is its own average: computing it would turn -0.0 into 0.0.
    return {
        kind: {
            stage: tree if table[stage] == FROZEN else jax.tree.map(average, tree, new[kind][stage])
            for stage, tree in stages.items()
        }
        for kind, stages in ema.items()
    }


def train_step(
    state: TrainState, batch: Mapping[str, jax.Array], key: jax.Array, *, parts: StepParts
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after one update, and sums to log: `loss`, `count`, gradient norms.

    Args:
      state: before the update; its buffers may be donated.
      batch: `image` uint8 `[b, h, w, c]`, `target` as `data.catalog.Split` has it; masks
        `[b, h, w]` are augmented with their images.
      key: of the whole run. The step folds its own number in, then a name for each use, so the
        draws depend on the seed and the step alone.
      parts: static.
    """
    key = jax.random.fold_in(key, state.step)
    masks = batch["target"] if batch["target"].ndim == 3 else None
    image, masks = parts.augment(named_key(key, "augment"), batch["image"], masks)
    if masks is not None:
        batch = {**batch, "target": masks}
    image = normalize(image, parts.spec.input)
    rngs = {"dropout": named_key(key, "dropout")}

    def loss(params):
        params = stop_frozen(params, parts.table)
        variables = {"params": params, "batch_stats": state.batch_stats}
        frozen = frozen_stages(parts.table)
        (logits, out), updated = parts.model.apply(
            variables, image, True, frozen, rngs=rngs, mutable=["batch_stats"]
        )
        out = {**out, "logits": logits}
        total = jnp.zeros(())
        for factor, term in parts.terms:
            value, count = term(out, batch, params, state.anchor)
            total = total + factor * value / jnp.maximum(count, 1e-12)
        # Linen returns no batch_stats for a network without batch norms.
        return total, updated.get("batch_stats", state.batch_stats)

    (value, batch_stats), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = parts.optimizer.update(gradients, state.opt_state, state.params)
    params = {
        # A frozen leaf is passed on as it is: adding an update of 0 would turn -0.0 into 0.0.
        stage: tree if parts.table[stage] == FROZEN else optax.apply_updates(tree, updates[stage])
        for stage, tree in state.params.items()
    }
    ema = state.ema
    if parts.ema_decay:
        new = {"params": params, "batch_stats": batch_stats}
        ema = _moving_average(ema, new, parts.ema_decay, state.step, parts.table)
    size = jnp.float32(image.shape[0])
    norms = group_norms(gradients, parts.table)
    logged = {
        "loss": value * size,
        "count": size,
        **{f"gradient_norm_{group}": norm * size for group, norm in norms.items()},
    }
    state = state.replace(
        step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema
    )
    return state, logged


def eval_step(variables: Tree, image: jax.Array, *, model: nn.Module, spec: ModelSpec) -> jax.Array:
    """Outputs of uint8 images `[b, h, w, c]` in evaluation mode.

    float32 `[b, outputs]`, or float16 `[b, h, w, classes]`: those of every pixel of a split have
    to fit in memory.
    """
    logits, _ = model.apply(variables, normalize(image, spec.input))
    return logits.astype(jnp.float16) if logits.ndim == 4 else logits


def take(data: Mapping[str, jax.Array], indices: jax.Array) -> dict[str, jax.Array]:
    """The batch at `indices` `[b]` of device-resident arrays `[n, ...]`."""
    return {name: array[indices] for name, array in data.items()}


def train_epoch(
    state: TrainState, data: Mapping[str, jax.Array], indices: jax.Array, key: jax.Array, *, parts
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after the steps whose examples are `indices` `[steps, b]`, and summed logs."""

    def body(state, row):
        return train_step(state, take(data, row), key, parts=parts)

    state, logged = jax.lax.scan(body, state, indices)
    return state, jax.tree.map(lambda leaf: leaf.sum(0), logged)
