"""One optimizer for each parameter group, joined by `optax.multi_transform`."""

from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import optax

from medtl_jax.errors import UserError
from medtl_jax.transfer import groups as group_table

Schedule = Callable[[jax.Array], jax.Array]


def warmup_cosine(
    peak: float, total_steps: int, warmup_steps: int, final_fraction: float
) -> Schedule:
    """Learning rate of a step: linear to `peak`, then a cosine to `peak * final_fraction`.

    The first step already has `peak / warmup_steps`: a rate of 0 would waste it.
    """
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
    """`{group: schedule}` for those of `low` and `high` that are among `groups`.

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
    for group in (group_table.LOW, group_table.HIGH):
        if group not in groups:
            continue
        rate = optim[group]["lr"]
        if not rate > 0:
            raise UserError(f"optim.{group}.lr={rate} must be positive; to freeze, use the groups")
        schedules[group] = warmup_cosine(rate, total_steps, warmup, optim["final_fraction"])
    return schedules


def _is_matrix(params):
    # Decay pulls kernels towards 0; on norms' scales and on biases it only hurts.
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)


def _group_optimizer(name: str, optim: Mapping, settings: Mapping, schedule: Schedule):
    decay = optax.add_decayed_weights(settings["weight_decay"], mask=_is_matrix)
    rules = {
        "adamw": lambda: [optax.scale_by_adam(), decay],
        "sgd": lambda: [decay, optax.trace(optim["momentum"])],
        "rmsprop": lambda: [decay, optax.scale_by_rms(0.9, 1e-3), optax.trace(optim["momentum"])],
    }
    if name not in rules:
        raise UserError(f"optim.name={name!r} is not known; choose from {', '.join(sorted(rules))}")
    clip = [optax.clip_by_global_norm(settings["clip"])] if settings["clip"] > 0 else []
    return optax.chain(*clip, *rules[name](), optax.scale_by_learning_rate(schedule))


def make_optimizer(optim: Mapping, labels, schedules: Mapping[str, Schedule]):
    """The `optax.GradientTransformation` over the whole parameter tree.

    Clipping and weight decay are chained *inside* each trainable group: outside, decay would
    move the frozen weights and a large frozen gradient would shrink the head's update.

    Args:
      optim: `config.optim`: `name` (`adamw`, `sgd`, `rmsprop`), `momentum`, and for `low` and
        `high` the keys `weight_decay` and `clip` (global norm of the group, 0 = off).
      labels: from `groups.label_tree`.
      schedules: from `make_schedules`.
    """
    transforms = {group_table.FROZEN: optax.set_to_zero()}
    for group, schedule in schedules.items():
        transforms[group] = _group_optimizer(optim["name"], optim, optim[group], schedule)
    return optax.multi_transform(transforms, labels)


def group_norms(gradients, table: Mapping[str, str]) -> dict[str, jax.Array]:
    """`{"low": norm, "high": norm}` of the gradients, for the groups that have members."""
    norms = {}
    for group in (group_table.LOW, group_table.HIGH):
        members = [tree for stage, tree in gradients.items() if table[stage] == group]
        if members:
            squares = (jnp.square(leaf).sum() for leaf in jax.tree.leaves(members))
            norms[group] = jnp.sqrt(sum(squares))
    return norms
