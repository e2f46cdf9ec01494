"""The train state, the one train step and the evaluation step: pure functions to be jitted."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from medtl_jax.augment.mix import Mix, mix_batch, mixed_loss
from medtl_jax.augment.policy import Augment
from medtl_jax.domain.alignment import ADAPTATION, TARGET_DOMAIN
from medtl_jax.errors import UserError
from medtl_jax.keys import named_key
from medtl_jax.models.inputs import normalize
from medtl_jax.models.registry import ModelSpec
from medtl_jax.objectives.task import LossTerm
from medtl_jax.training.accumulate import accumulated, shares
from medtl_jax.transfer.groups import FROZEN, frozen_stages, stop_frozen
from medtl_jax.transfer.optim import Schedule, group_norms

Tree = Any

LOGITS = "logits"


@flax.struct.dataclass
class TrainState:
    """Everything that training changes; saved and restored as a whole.

    Attributes:
      step: int32, number of updates made.
      params, batch_stats: of the network.
      opt_state: of the optimizers of all groups.
      anchor: `{"params", "batch_stats"}` before training, which the terms of L_pre hold on to;
        None where no term does.
      ema: average `{"params", "batch_stats"}` of the states so far, see `StepParts`, or None.
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
class Term:
    """A part of the loss: `weight * factor` times the mean of `term`.

    Attributes:
      name: `new`, `pre` or `domain`; the values of each are logged as `loss_<name>`.
      weight: alpha or beta: a number, or a schedule over the steps.
      term: see `objectives.losses`.
      factor: of the term among those of its name.
      logs: `fn(out, batch, params) -> {name: value}`, what else to log of it.
    """

    name: str
    weight: float | Schedule
    term: LossTerm
    factor: float = 1.0
    logs: Callable[..., Mapping[str, jax.Array]] | None = None


@dataclasses.dataclass(frozen=True)
class Average:
    """How the states are averaged for evaluation.

    Attributes:
      ema: decay of an exponential moving average; 0 = off.
      swa_start: the step whose result is the first of an equally weighted mean (stochastic weight
        averaging, Izmailov et al. 2018); None = off. Until then the average is the last state.
    """

    ema: float = 0.0
    swa_start: int | None = None

    def __post_init__(self):
        if not 0 <= self.ema < 1:
            raise UserError(f"train.ema={self.ema} must lie in 0 <= decay < 1")
        if self.ema and self.swa_start is not None:
            raise UserError(
                f"train.ema={self.ema} and train.swa are two averages of the weights: set one to 0"
            )

    @property
    def used(self) -> bool:
        """Whether there is an average at all."""
        return self.ema > 0 or self.swa_start is not None

    def decay(self, step: jax.Array) -> jax.Array:
        """The weight of the average so far, where step number `step` (from 0) has been made."""
        count = step.astype(jnp.float32)
        if self.swa_start is not None:
            behind = count - self.swa_start
            return jnp.where(behind > 0, behind / (behind + 1.0), 0.0)
        # Early on the average would be dominated by the start; this is the usual warm-up of the
        # decay (Abadi et al. 2015, ExponentialMovingAverage with num_updates).
        return jnp.minimum(self.ema, (1.0 + count) / (10.0 + count))


def _no_norms(step: jax.Array) -> dict:
    del step
    return {}


@dataclasses.dataclass(frozen=True)
class StepParts:
    """What a step is made of and training does not change, in one phase of it.

    Attributes:
      model, spec: the network and what its input is.
      optimizer: over the whole parameter tree.
      table: stage -> group, from `groups.assign_stages`.
      labels: the group of each leaf of the parameters, from `groups.label_tree`.
      terms: their weighted means are added up to the loss.
      augment: on the raw image, before normalisation.
      mix: of the images of a batch as the network reads them, and of its losses; None = off. With
        `start` there are no images to mix.
      average: of the states, to evaluate with.
      norms: `fn(step) -> {stage: what its batch norms do}`, see `Backbone`.
      start: the part of the network that the batches are made for, see `Backbone`: with one,
        `image` is what the frozen stages before it make of the images, and `augment` is not used.
      teacher: whether a term needs what the network makes of the batch with the anchor's values.
      adaptation: `fn(step)`, the strength lambda of the terms that compare two domains; None where
        the batches hold no unlabelled images of a target.
      target_domain: whose batch statistics these images meet and move. Where it is that of the
        labelled images, 0, they are normalised by their own batch and move nothing.
      run_table, run_labels: `table` and `labels` of the whole training, where a stage that this
        phase freezes may learn in another one; None where there is one phase.
      accumulate: in how many equal parts, one after the other, the gradient of a batch is computed.
        They are augmented and mixed as one batch, and a mean named `new` is over the entries of
        all parts: without batch norms and dropout, which see each part by itself, it and its
        gradient are those of 1. Of the terms of other names, and of what is no sum over entries,
        each part has its own: the result is the mean over the parts, for the soft Dice beside a
        cross-entropy weighted with the parts' counts.
      remat: whether the stages' values are computed again for the gradient, see `Backbone`.
    """

    model: nn.Module
    spec: ModelSpec
    optimizer: optax.GradientTransformation
    table: Mapping[str, str]
    labels: Tree
    terms: tuple[Term, ...]
    augment: Augment
    mix: Mix | None = None
    average: Average = Average()
    norms: Callable[[jax.Array], dict] = _no_norms
    start: str = ""
    teacher: bool = False
    adaptation: Callable[[jax.Array], jax.Array] | None = None
    target_domain: int = 0
    run_table: Mapping[str, str] | None = None
    run_labels: Tree = None
    accumulate: int = 1
    remat: bool = False


def create_state(variables: Tree, parts: StepParts, anchored: bool = False) -> TrainState:
    """The state before the first step. The optimizer sees the pretrained values.

    With `anchored` they stay in the state, for the terms of L_pre.
    """
    ema = jax.tree.map(jnp.copy, dict(variables)) if parts.average.used else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=parts.optimizer.init(variables["params"]),
        anchor=jax.tree.map(jnp.copy, dict(variables)) if anchored else None,
        ema=ema,
        phase=jnp.zeros((), jnp.int32),
    )


def evaluation_variables(state: TrainState) -> Tree:
    """`{"params", "batch_stats"}` to evaluate with: the average where there is one."""
    return state.ema or {"params": state.params, "batch_stats": state.batch_stats}


def _averaged(ema: Tree, new: Tree, step: jax.Array, parts: StepParts) -> Tree:
    weight = 1 - parts.average.decay(step)

    def average(old, value, label):
        # What never learns is its own average: computing it would turn -0.0 into 0.0.
        return old if label == FROZEN else old + weight * (value - old)

    table = parts.run_table or parts.table
    statistics = {
        stage: jax.tree.map(lambda _, group=table[stage]: group, tree)
        for stage, tree in ema["batch_stats"].items()
    }
    labels = {"params": parts.run_labels or parts.labels, "batch_stats": statistics}
    return jax.tree.map(average, ema, new, labels)


def _inputs(batch: Mapping[str, jax.Array], key: jax.Array, parts: StepParts) -> dict:
    """The batch with its images, and masks if there are some, augmented and normalised."""
    if parts.start:
        return dict(batch)
    masks = batch["target"] if batch["target"].ndim == 3 else None
    image, masks = parts.augment(key, batch["image"], masks)
    target = batch["target"] if masks is None else masks
    return {**batch, "image": normalize(image, parts.spec.input), "target": target}


def _teacher(anchor: Tree, batch: Mapping, parts: StepParts) -> dict[str, jax.Array]:
    """What the network before training makes of the batch, in evaluation mode."""
    _, out = parts.model.apply(jax.lax.stop_gradient(anchor), batch["image"], start=parts.start)
    return jax.lax.stop_gradient(out)


def _outputs(params, batch_stats, image, key, domain, step, parts: StepParts) -> tuple[dict, Tree]:
    """`(out, batch_stats)` of the network in training; `out` has the logits, too."""
    (logits, out), updated = parts.model.apply(
        {"params": params, "batch_stats": batch_stats},
        image,
        True,
        frozen_stages(parts.table),
        domain,
        norms=parts.norms(step),
        start=parts.start,
        remat=parts.remat,
        rngs={"dropout": key},
        mutable=["batch_stats"],
    )
    # Linen returns no batch_stats for a network without batch norms.
    return {**out, LOGITS: logits}, updated.get("batch_stats", batch_stats)


def _loss(
    params, state: TrainState, batch: dict, key: jax.Array, parts: StepParts, counts: Sequence
):
    """`(loss, (batch_stats, {"loss_new": ..., ...}))` of the parameters `params`.

    `counts` has what to divide each term's sum by; None = its own count.
    """
    params = stop_frozen(params, parts.labels)

    def apply(image, name, batch_stats=state.batch_stats, domain=0):
        own = named_key(key, name)
        return _outputs(params, batch_stats, image, own, domain, state.step, parts)

    out, batch_stats = apply(batch["image"], "dropout")
    if "source" in batch:
        # By its own batch's statistics; the running ones are for the images that are to be learned.
        source_out, _ = apply(batch["source"]["image"], "source_dropout")
        batch = {**batch, "source": {**batch["source"], "out": source_out}}
    if parts.adaptation is not None:
        images, strength = batch[TARGET_DOMAIN]["image"], parts.adaptation(state.step)
        target_out, moved = apply(images, "target_dropout", batch_stats, parts.target_domain)
        batch_stats = moved if parts.target_domain else batch_stats
        target = {**batch[TARGET_DOMAIN], "out": target_out}
        batch = {**batch, TARGET_DOMAIN: target, ADAPTATION: strength}
    total, sums, logged = jnp.zeros(()), {}, {}
    for part, given in zip(parts.terms, counts, strict=True):
        value, count = mixed_loss(part.term, out, batch, params, state.anchor)
        count = count if given is None else given
        mean = part.factor * value / jnp.maximum(count, 1e-12)
        weight = part.weight(state.step) if callable(part.weight) else part.weight
        total = total + weight * mean
        sums[f"loss_{part.name}"] = sums.get(f"loss_{part.name}", jnp.zeros(())) + mean
        logged |= part.logs(out, batch, params) if part.logs else {}
    # Of one kind alone there is nothing to tell apart.
    return total, (batch_stats, logged | (sums if len(sums) > 1 else {}))


def _counts(state: TrainState, batch: dict, key: jax.Array, parts: StepParts) -> list:
    """What each term's sum over a part of the batch is divided by; None = its count there."""

    def outputs():
        return _outputs(state.params, state.batch_stats, batch["image"], key, 0, state.step, parts)

    shapes, _ = jax.eval_shape(outputs)
    terms = [part.term if part.name == "new" else None for part in parts.terms]
    return shares(terms, shapes, batch, state.params, state.anchor, parts.accumulate)


def _gradients(state: TrainState, batch: dict, key: jax.Array, parts: StepParts):
    """`((loss, (batch_stats, logs)), gradients)` of the batch, whole or in parts."""

    whole = parts.accumulate == 1
    counts = [None] * len(parts.terms) if whole else _counts(state, batch, key, parts)

    def of(batch_stats, batch, key):
        if parts.teacher:
            batch = {**batch, "teacher": _teacher(state.anchor, batch, parts)}
        before = state.replace(batch_stats=batch_stats)
        graded = jax.value_and_grad(_loss, has_aux=True)
        return graded(state.params, before, batch, key, parts, counts)

    if whole:
        return of(state.batch_stats, batch, key)
    return accumulated(of, state.batch_stats, batch, key, parts.accumulate)


def train_step(
    state: TrainState, batch: Mapping[str, jax.Array], key: jax.Array, *, parts: StepParts
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after one update, and sums to log: the losses, `count`, gradient norms.

    Args:
      state: before the update; its buffers may be donated.
      batch: `image` uint8 `[b, h, w, c]`, `target` as `data.catalog.Split` has it; masks
        `[b, h, w]` are augmented with their images. `source`, for terms that replay: a batch of
        the source set of the same form. `target_domain`, for terms that adapt: a batch of the
        target without labels.
      key: of the whole run. The step folds its own number in, then a name for each use, so the
        draws depend on the seed and the step alone.
      parts: static.
    """
    key = jax.random.fold_in(key, state.step)
    batch = _inputs(batch, named_key(key, "augment"), parts)
    if parts.mix is not None:
        batch = mix_batch(named_key(key, "mixup"), batch, parts.mix)
    for other in ("source", TARGET_DOMAIN):
        if other in batch:
            own = _inputs(batch[other], named_key(key, f"{other}_augment"), parts)
            if other == TARGET_DOMAIN and parts.mix is not None:
                # Images of one domain alone would be told from the others by being mixed.
                own = mix_batch(named_key(key, f"{other}_mixup"), own, parts.mix)
            batch = {**batch, other: own}
    (value, (batch_stats, sums)), gradients = _gradients(state, batch, key, parts)
    updates, opt_state = parts.optimizer.update(gradients, state.opt_state, state.params)
    # A frozen leaf is passed on as it is: adding an update of 0 would turn -0.0 into 0.0.
    params = jax.tree.map(
        lambda leaf, update, label: leaf if label == FROZEN else optax.apply_updates(leaf, update),
        state.params,
        updates,
        parts.labels,
    )
    ema = state.ema
    if parts.average.used:
        new = {"params": params, "batch_stats": batch_stats}
        ema = _averaged(ema, new, state.step, parts)
    size = jnp.float32(batch["image"].shape[0])
    norms = group_norms(gradients, parts.labels)
    logged = {
        "loss": value * size,
        "count": size,
        **{name: mean * size for name, mean in sums.items()},
        **{f"gradient_norm_{group}": norm * size for group, norm in norms.items()},
    }
    state = state.replace(
        step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema
    )
    return state, logged


def eval_step(
    variables: Tree,
    image: jax.Array,
    *,
    model: nn.Module,
    spec: ModelSpec,
    start: str = "",
    output: str = LOGITS,
) -> jax.Array:
    """Outputs of uint8 images `[b, h, w, c]` in evaluation mode; with `start`, as in `StepParts`.

    float32 `[b, outputs]`, or float16 `[b, h, w, classes]`: those of every pixel of a split have
    to fit in memory. `output` may be another entry of the network's `out` than its logits.
    """
    image = image if start else normalize(image, spec.input)
    logits, out = model.apply(variables, image, start=start)
    found = logits if output == LOGITS else out[output]
    return found.astype(jnp.float16) if found.ndim == 4 else found


def take(data: Mapping[str, Tree], indices: Mapping[str, jax.Array]) -> dict[str, Tree]:
    """The batch of device-resident sets `{"train": {"image", "target"}, ...}`.

    `indices` has `[b]` for each set; what is not of `train` stands in the batch under its name.
    """
    batch = {
        name: {key: array[indices[name]] for key, array in arrays.items()}
        for name, arrays in data.items()
    }
    return {**batch.pop("train"), **batch}


def train_epoch(
    state: TrainState, data: Mapping[str, jax.Array], indices: jax.Array, key: jax.Array, *, parts
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after the steps whose examples are `indices` `[steps, b]`, and summed logs."""

    def body(state, row):
        return train_step(state, take(data, row), key, parts=parts)

    state, logged = jax.lax.scan(body, state, indices)
    return state, jax.tree.map(lambda leaf: leaf.sum(0), logged)
