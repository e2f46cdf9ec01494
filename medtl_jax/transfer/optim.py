"""One optimizer for each parameter group, joined by `optax.multi_transform`."""

from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from medtl_jax.errors import UserError
from medtl_jax.models.backbone import SOURCE_HEAD
from medtl_jax.transfer import groups as group_table

Schedule = Callable[[jax.Array], jax.Array]


def warmup_cosine(
    peak: float | jax.Array, total_steps: int, warmup_steps: int, final_fraction: float
) -> Schedule:
    """Learning rate of a step: linear to `peak`, then a cosine to `peak * final_fraction`.

    The first step already has `peak / warmup_steps`: a rate of 0 would waste it. `peak` may be
    traced.
    """
    if isinstance(peak, jax.Array):
        # optax asks whether the peak is 0.
        unit = warmup_cosine(1.0, total_steps, warmup_steps, final_fraction)
        return lambda step: peak * unit(step)
    if warmup_steps == 0:
        return optax.cosine_decay_schedule(peak, total_steps, alpha=final_fraction)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / warmup_steps,
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=max(total_steps, warmup_steps + 1),
        end_value=peak * final_fraction,
    )


def make_schedules(
    optim: Mapping, groups: Collection[str], total_steps: int, steps_per_epoch: int
) -> dict[str, Schedule]:
    """`{group: schedule}` for those of `groups.TRAINED` that are among `groups`.

    Warm-up and end are common, `optim.warmup_epochs` and `optim.final_fraction`; the peak is
    `optim.<group>.lr`. UserError on values that make no schedule.
    """
    warmup = round(optim["warmup_epochs"] * steps_per_epoch)
    if not 0 <= warmup < max(total_steps, 1):
        raise UserError(
            f"optim.warmup_epochs={optim['warmup_epochs']} must be at least 0 and "
            "shorter than the training (train.epochs)"
        )
    if not 0 <= optim["final_fraction"] <= 1:
        raise UserError(f"optim.final_fraction={optim['final_fraction']} must lie in 0..1")
    schedules = {}
    for group in group_table.TRAINED:
        if group not in groups:
            continue
        rate = optim[group]["lr"]
        # A traced rate, that of a member of an ensemble, was checked as a number.
        if not isinstance(rate, jax.Array) and not rate > 0:
            raise UserError(f"optim.{group}.lr={rate} must be positive; to freeze, use the groups")
        schedules[group] = warmup_cosine(rate, total_steps, warmup, optim["final_fraction"])
    return schedules


def _is_matrix(params):
    # Decay pulls kernels towards 0; on norms' scales and on biases it only hurts.
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)


def layer_scales(stages: Sequence[str], table: Mapping[str, str], decay: float) -> dict[str, float]:
    """`{stage: factor of its learning rate}` of the trainable stages: layer-wise decay.

    As in BEiT (Bao et al. 2022) and timm: the new parts have 1, the last stage has `decay`, the
    one before `decay ** 2` and so on. Frozen stages are counted too, so that a factor belongs to a
    place in the network and is the same in every phase. The pretrained classifier, which reads
    what the new head reads, has the factor of the last stage and moves no other's.

    Args:
      stages: of the backbone in forward order, `ModelSpec.stages`.
      table: stage -> group, of the new parts and the pretrained classifier too.
      decay: `config.transfer.layer_decay`. UserError unless it is in 0 < decay <= 1.
    """
    if not 0 < decay <= 1:
        raise UserError(f"transfer.layer_decay={decay} must be more than 0 and at most 1; 1 = off")
    scales = {stage: decay**distance for distance, stage in enumerate(reversed(stages), 1)}
    scales[SOURCE_HEAD] = decay
    return {
        stage: scales.get(stage, 1.0)
        for stage, group in table.items()
        if group != group_table.FROZEN
    }


def _clip_apart(limit: float, new: Collection[str]) -> optax.GradientTransformation:
    """Clips the gradients of the stages `new` and those of the others, each by their global norm.

    The new layers' update is `W_new - eta * grad(beta L_new)`: one norm over both would shrink it
    wherever the gradient of alpha L_pre, which the pretrained stages alone have, is large.
    """
    clip = optax.clip_by_global_norm(limit)

    def update(updates, params=None):
        del params
        clipped = {}
        for is_new in (True, False):
            part = {stage: tree for stage, tree in updates.items() if (stage in new) == is_new}
            clipped |= clip.update(part, optax.EmptyState())[0]
        return {stage: clipped[stage] for stage in updates}

    return optax.stateless(update)


def _scale_stages(scales: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of each stage by its factor, 1 where it has none."""

    def scaled(stage, tree):
        factor = scales.get(stage, 1.0)
        return jax.tree.map(lambda leaf: factor * leaf, tree)

    def update(updates, params=None):
        del params
        return {stage: scaled(stage, tree) for stage, tree in updates.items()}

    return optax.stateless(update)


def _from_step(schedule: Schedule, first: int) -> Schedule:
    return lambda step: schedule(step + first)


def _group_optimizer(
    name: str, optim: Mapping, settings: Mapping, schedule: Schedule, new: Collection[str]
) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(settings["weight_decay"], mask=_is_matrix)
    rules = {
        "adamw": lambda: [optax.scale_by_adam(), decay],
        "sgd": lambda: [decay, optax.trace(optim["momentum"])],
        "rmsprop": lambda: [decay, optax.scale_by_rms(0.9, 1e-3), optax.trace(optim["momentum"])],
    }
    if name not in rules:
        raise UserError(f"optim.name={name!r} is not known; choose from {', '.join(sorted(rules))}")
    clip = [_clip_apart(settings["clip"], new)] if settings["clip"] > 0 else []
    return optax.chain(*clip, *rules[name](), optax.scale_by_learning_rate(schedule))


def make_optimizer(
    optim: Mapping,
    labels,
    schedules: Mapping[str, Schedule],
    scales: Mapping[str, float] | None = None,
    new: Collection[str] = (),
    first_step: int = 0,
) -> optax.GradientTransformation:
    """The `optax.GradientTransformation` over the whole parameter tree.

    Clipping and weight decay are chained *inside* each trainable group: outside, decay would
    move the frozen weights and a large frozen gradient would shrink the head's update. Within a
    group that holds both new and pretrained stages the two are clipped apart, so that L_pre,
    which acts on the pretrained ones, cannot shrink the new layers' update either.

    Args:
      optim: `config.optim`: `name` (`adamw`, `sgd`, `rmsprop`), `momentum`, and for each
        of `groups.TRAINED` the keys `weight_decay` and `clip` (global norm, 0 = off).
      labels: from `groups.label_tree`; the leaves of a stage may differ.
      schedules: from `make_schedules`.
      scales: from `layer_scales`; a stage's learning rate, and with it its weight decay, is that
        of its group times the factor. None, or 1 for all: off.
      new: the stages that the pretrained network does not have: auxiliary heads, decoder, head.
      first_step: of the training, at which this optimizer begins: that of its phase. Its own count
        begins at 0, the schedules go on from here.
    """
    transforms = {group_table.FROZEN: optax.set_to_zero()}
    for group, schedule in schedules.items():
        schedule = _from_step(schedule, first_step) if first_step else schedule
        transforms[group] = _group_optimizer(optim["name"], optim, optim[group], schedule, new)
    optimizer = optax.multi_transform(transforms, labels)
    if scales and any(factor != 1 for factor in scales.values()):
        return optax.chain(optimizer, _scale_stages(scales))
    return optimizer


def group_norms(gradients, labels) -> dict[str, jax.Array]:
    """`{"low": norm, "high": norm, ...}` of the gradients, for the groups that have members.

    `labels` is a tree like `gradients`, from `groups.label_tree`.
    """
    pairs = list(zip(jax.tree.leaves(gradients), jax.tree.leaves(labels), strict=True))
    norms = {}
    for group in group_table.TRAINED:
        members = [leaf for leaf, label in pairs if label == group]
        if members:
            norms[group] = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in members))
    return norms
