"""Which runs of a study are trained as the members of one program, see `config.train.program`."""

import hashlib
import json
import math
from collections.abc import Sequence

import jax
import numpy as np

from experiments import domain_settings, study
from experiments.assembly import varying_values, with_values
from experiments.options import group_table
from experiments.prepared import Prepared
from experiments.settings import ALONE
from experiments.study import Request
from medtl_jax.data.streams import is_streamed
from medtl_jax.ensemble.members import AUTO
from medtl_jax.objectives.pretrain import parse_pretrain_loss
from medtl_jax.process import sharers
from medtl_jax.transfer.groups import FROZEN

# Runs of a study that one process takes at once.
MOST = 16

# Losses of L_pre that are made of what a run has computed for itself.
_OF_THE_RUN = ("delta", "cotuning")


def may_share(config: dict) -> bool:
    """Whether a run with `config` may be trained in one program with others of its kind.

    With `train.program=auto` convolutions on the one device of a CPU do not: they would take turns
    on the same cores.
    """
    program, pre = config["train"]["program"], config["transfer"]["pretrain_loss"]
    if program == ALONE or domain_settings.wanted(config):
        return False
    if any(name in _OF_THE_RUN for _, name in parse_pretrain_loss(pre)):
        return False
    if program != AUTO or _trains_head_alone(config):
        return True
    devices = config["train"]["devices"] or len(jax.devices())
    return devices > 1 or jax.default_backend() != "cpu"


def _trains_head_alone(config: dict) -> bool:
    """Whether nothing but a head on kept features learns."""
    stages = study.architecture(config).stages
    frozen = all(group_table(config)[stage] == FROZEN for stage in stages)
    return config["transfer"]["cache"] == "prefix" and frozen


def packs(configs: Sequence[dict]) -> list[list[int]]:
    """The places of the configs, those together that may come to be members of one program.

    At most `MOST` are together, and of a study that so many processes are known to share no more
    than are one's part: a machine that takes part leaves some to the others.
    """
    most = min(MOST, math.ceil(len(configs) / sharers()))
    found: list[list[int]] = []
    latest: dict[str, list[int]] = {}
    for place, config in enumerate(configs):
        key = _common_settings(config) if may_share(config) else str(place)
        if key not in latest or len(latest[key]) == most:
            latest[key] = []
            found.append(latest[key])
        latest[key].append(place)
    return found


def programs_of(begun: Sequence[tuple[Request, Prepared]]) -> list[list[tuple[Request, Prepared]]]:
    """The runs, those together that are trained as the members of one program.

    These differ by seeds, images of the same number, and values of `assembly.VARYING` alone.
    """
    groups: dict[str, list] = {}
    for number, (request, prepared) in enumerate(begun):
        shared = _in_common(request.config, prepared) if may_share(request.config) else ""
        groups.setdefault(shared or str(number), []).append((request, prepared))
    return list(groups.values())


def _in_common(config: dict, prepared: Prepared) -> str:
    """What the runs of one program have in common; empty for one whose images stream."""
    training, train = prepared.training, config["train"]
    sets = training.feed.sets
    if any(is_streamed(array) for arrays in sets.values() for array in arrays.values()):
        return ""
    shapes = {name: [array.shape for array in arrays.values()] for name, arrays in sets.items()}
    # What the loss makes of the training targets is the same for all members.
    reads = training.task.name == "regress" or train["class_weights"] != "none"
    reads = reads or train["logit_adjustment"] > 0
    target = np.asarray(sets["train"]["target"]) if reads else np.empty(0)
    digest = hashlib.sha256(target.tobytes()).hexdigest()
    epochs = training.settings.epochs
    return json.dumps([_common_settings(config), shapes, epochs, digest])


def _common_settings(config: dict) -> str:
    """The settings that runs of one program have in common, and which of the others are on."""
    values = varying_values(config)
    on = [key for key, value in values.items() if value]
    apart = with_values(config, {**dict.fromkeys(values, 0.0), "seed": 0, "data.seed_draw": 0})
    return json.dumps([apart, on], sort_keys=True)
