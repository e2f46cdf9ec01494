"""The one table that says which stage is frozen, which learns slowly and which fast.

It drives the optimizers, the `stop_gradient` on frozen leaves and the batch norms' mode.
"""

import re
from collections.abc import Collection, Iterable, Mapping

import jax

from medtl_jax.errors import UserError

FROZEN, LOW, HIGH = "frozen", "low", "high"
GROUPS = (FROZEN, LOW, HIGH)
# The group of a domain discriminator, which is no part of the network.
DISCRIMINATOR = "discriminator"
TRAINED = (LOW, HIGH, DISCRIMINATOR)


def assign_stages(stages: tuple[str, ...], groups: Mapping[str, str]) -> dict[str, str]:
    """`{stage: group}` with every stage in exactly one group.

    Args:
      stages: top-level names of the parameters, e.g. `("stem", "stage1", ..., "head")`.
      groups: for each of `frozen`, `low`, `high` comma-separated regular expressions, each
        matched against a whole stage name.

    Raises:
      UserError: a pattern is no regular expression or matches nothing, a stage is matched by no
        group or by two, or nothing is left to train.
    """
    found: dict[str, list[str]] = {stage: [] for stage in stages}
    for group in GROUPS:
        members = set()
        for pattern in filter(None, (part.strip() for part in groups[group].split(","))):
            try:
                matched = [stage for stage in stages if re.fullmatch(pattern, stage)]
            except re.error as error:
                raise UserError(
                    f"transfer.groups.{group}: {pattern!r} is no regular expression ({error})"
                ) from None
            if not matched:
                raise UserError(
                    f"transfer.groups.{group}: {pattern!r} matches no stage of the model; "
                    f"its stages are {', '.join(stages)}"
                )
            members.update(matched)
        for stage in members:
            found[stage].append(group)
    twice = [f"{stage} ({' and '.join(names)})" for stage, names in found.items() if len(names) > 1]
    if twice:
        raise UserError(f"transfer.groups: in two groups: {', '.join(twice)}; name each stage once")
    none = [stage for stage, names in found.items() if not names]
    if none:
        raise UserError(
            f"transfer.groups: in no group: {', '.join(none)}; add to frozen, low or high"
        )
    table = {stage: names[0] for stage, names in found.items()}
    if set(table.values()) == {FROZEN}:
        raise UserError("transfer.groups: every stage is frozen; leave at least the head to train")
    return table


def default_groups(
    stages: tuple[str, ...], heads: tuple[str, ...], freeze: bool = True
) -> dict[str, str]:
    """Patterns for `assign_stages`: the backbone's `stages` in `low`, the new `heads` in `high`.

    With `freeze`, the stem and the first half of the stages are frozen.
    """
    numbered = [stage for stage in stages if stage.startswith("stage")]
    frozen = {"stem", *numbered[: len(numbered) // 2]} if freeze else set()
    return {
        FROZEN: ",".join(stage for stage in stages if stage in frozen),
        LOW: ",".join(stage for stage in stages if stage not in frozen),
        HIGH: ",".join(heads),
    }


def check_loaded(table: Mapping[str, str], kept: Iterable[str], heads: Iterable[str]) -> None:
    """UserError where a frozen stage would keep random values for good.

    Args:
      table: as from `assign_stages`.
      kept: flat names (`"params/stem/conv/kernel"`) of what no weights file gave a value.
      heads: the stages that are classifiers, main and auxiliary.
    """
    drawn = {name.split("/")[1] for name in kept}
    stages = [stage for stage in table if stage in drawn and table[stage] == FROZEN]
    if not stages:
        return
    setting = "model.keep_head" if set(stages) <= set(heads) else "model.dont_load"
    several = len(stages) > 1
    raise UserError(
        f"{', '.join(stages)} {'keep their' if several else 'keeps its'} own first values "
        f"({setting}) but {'are' if several else 'is'} frozen: put {'them' if several else 'it'} "
        "into low or high of transfer.groups"
    )


def label_tree(params, table: Mapping[str, str], frozen_norms: Collection[str] = ()):
    """A tree like `params` with each leaf replaced by its group's name.

    In the stages `frozen_norms` the batch norms' scales and biases are frozen too.
    """

    def label(path, _):
        stage = path[0].key
        frozen = stage in frozen_norms and _is_norm(params, path)
        return FROZEN if frozen else table[stage]

    return jax.tree_util.tree_map_with_path(label, params)


def _is_norm(params, path) -> bool:
    """Whether the leaf at `path` is a batch norm's: those have a scale and a bias and no kernel."""
    for entry in path[:-1]:
        params = params[entry.key]
    return {"scale", "bias"} <= params.keys() and "kernel" not in params


def frozen_stages(table: Mapping[str, str]) -> tuple[str, ...]:
    """The stages whose batch norms keep their statistics, as `apply(frozen=...)` takes them."""
    return tuple(stage for stage, group in table.items() if group == FROZEN)


def stop_frozen(params, labels):
    """`params` with `stop_gradient` on the leaves that `labels` calls frozen.

    XLA then drops their backward pass, even when the gradients' norm is logged.
    """
    return jax.tree.map(
        lambda leaf, label: jax.lax.stop_gradient(leaf) if label == FROZEN else leaf, params, labels
    )
