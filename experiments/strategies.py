"""Transfer strategies by name: each is a few settings of the config, over the same training step.

From the least that is learned of the images to the most: nothing but the labels of neighbours, a
linear classifier, a head, some stages, all stages; then all stages held back by L_pre. One that is
held back may be written with another alpha than its usual one, as in `l2sp@0.1`. Last the
traditional ones, which have no network: `hog_svm` and so on.
"""

import dataclasses
import math
from collections.abc import Mapping, Set
from typing import Any

from medtl_jax.errors import UserError
from medtl_jax.runs import flat_config, nested_config

# The experiments that train; others use what a run of these has made.
_TRAINING = ("finetune", "extract", "traditional", "find_lr")
_ALPHA = "transfer.alpha"
# Whatever the network: its pretrained parts, and those that belong to the task.
_PRETRAINED = "(stem|stage|features).*"
_NEW = "(head|decoder|aux).*"
_FULL = {
    "transfer.groups.frozen": "",
    "transfer.groups.low": _PRETRAINED,
    "transfer.groups.high": _NEW,
}


@dataclasses.dataclass(frozen=True)
class Strategy:
    """What a strategy is, in one line, and the flat keys of the config that make it."""

    summary: str
    settings: Mapping[str, Any]


def _kept(loss: str, alpha: float, **settings) -> dict[str, Any]:
    """All stages learn, held back by alpha times L_pre."""
    pretrain = {"transfer.pretrain_loss": loss, _ALPHA: alpha}
    return {**_FULL, **pretrain, **settings}


_DESCRIPTORS = {
    "hog": "histograms of oriented gradients",
    "lbp": "local binary patterns",
    "pixels": "raw pixels",
}
_CLASSIFIERS = {"logistic": "logistic regression", "svm": "an SVM", "forest": "a random forest"}


def _traditional(features: str, classifier: str) -> Strategy:
    """No network: a classifier of hand-made descriptors."""
    return Strategy(
        f"no network: {_CLASSIFIERS[classifier]} on {_DESCRIPTORS[features]}; not augmented",
        {
            "experiment": "traditional",
            "model.weights": "none",
            "traditional.features": features,
            "traditional.classifier": classifier,
        },
    )


STRATEGIES = {
    "scratch": Strategy(
        "the same network without pretrained weights",
        {
            "model.weights": "none",
            "transfer.groups.frozen": "",
            "transfer.groups.low": "",
            "transfer.groups.high": ".*",
        },
    ),
    "knn": Strategy(
        "the labels of the nearest training images in the features of the frozen network; not "
        "augmented, except by transfer.views",
        {"experiment": "extract", "probe.kind": "knn"},
    ),
    "probe": Strategy(
        "a linear classifier on the features of the frozen network, by L-BFGS; not augmented, "
        "except by transfer.views",
        {"experiment": "extract", "probe.kind": "linear"},
    ),
    "head": Strategy(
        "frozen network, head trained by gradient steps on cached features; not augmented, "
        "except by transfer.views",
        {
            "transfer.groups.frozen": _PRETRAINED,
            "transfer.groups.low": "",
            "transfer.groups.high": _NEW,
            "transfer.cache": "prefix",
        },
    ),
    "lpft": Strategy(
        "linear probe first, then all stages from there, with stored statistics: those of the "
        "features that were probed (Kumar et al. 2022)",
        {
            **_FULL,
            "transfer.probe_first": True,
            "transfer.bn.low": "stats",
            "transfer.bn.high": "stats",
        },
    ),
    "groups": Strategy(
        "first half of the stages frozen, the rest slowly, the head fast",
        {"transfer.groups.frozen": "", "transfer.groups.low": "", "transfer.groups.high": ""},
    ),
    "decay": Strategy("all stages, the earlier the slower", {**_FULL, "transfer.layer_decay": 0.7}),
    "full": Strategy("all stages slowly, the head fast", _FULL),
    "gradual": Strategy(
        "head, then the second half of the stages, then all (Howard & Ruder 2018)",
        {**_FULL, "transfer.phases": "auto"},
    ),
    "l2sp": Strategy(
        "all stages, held to the pretrained weights (L2-SP, Li et al. 2018)",
        _kept("l2sp", 0.01, **{"optim.low.weight_decay": 0.0}),
    ),
    "delta": Strategy(
        "all stages, held to the pretrained maps (DELTA, Li et al. 2019)", _kept("delta", 1.0)
    ),
    "lwf": Strategy(
        "all stages, held to the pretrained classifier's answers (LwF, Li & Hoiem 2017)",
        _kept("lwf", 1.0),
    ),
    "replay": Strategy(
        "all stages, with images of transfer.source through the pretrained classifier in every "
        "step (rehearsal, Robins 1995)",
        _kept("replay", 0.3),
    ),
    "cotuning": Strategy(
        "all stages, with source classes that stand for the target's (Co-Tuning, You et al. 2020)",
        _kept("cotuning", 1.0),
    ),
    "bss": Strategy(
        "all stages, the smallest singular values of the features pressed down (Chen et al. 2019)",
        _kept("bss", 0.001),
    ),
} | {
    f"{features}_{classifier}": _traditional(features, classifier)
    for features in _DESCRIPTORS
    for classifier in _CLASSIFIERS
}


def find_strategy(text: str, key: str = "transfer.strategy") -> Strategy:
    """The strategy that `text` names, as `name` or as `name@alpha`.

    Args:
      text: a name of `STRATEGIES`; the alpha is for those that have one.
      key: the setting that `text` is of, for messages.

    Raises:
      UserError: no such strategy, one without an alpha, or an alpha that is no positive number.
    """
    name, at, alpha = text.partition("@")
    if name not in STRATEGIES:
        raise UserError(f"{key}={text!r} is not known; choose from {', '.join(STRATEGIES)}")
    strategy = STRATEGIES[name]
    if not at:
        return strategy
    if _ALPHA not in strategy.settings:
        able = [one for one, other in STRATEGIES.items() if _ALPHA in other.settings]
        raise UserError(f"{key}={text!r}: {name} has no alpha; those that have: {', '.join(able)}")
    try:
        value = float(alpha)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{key}={text!r}: {alpha!r} must be a positive number, as in {name}@0.1")
    return Strategy(f"{strategy.summary}; alpha {value:g}", {**strategy.settings, _ALPHA: value})


def expand(config: dict, given: Set[str] = frozenset()) -> dict:
    """`config` with the settings of its `transfer.strategy`, where it has one and is to train.

    Raises:
      UserError: as `find_strategy`; the strategy trains, and the experiment is `extract`; it has a
        network, and the experiment is `traditional`; a key of `given`, those set on the command
        line, has another value than the strategy needs.
    """
    name = config["transfer"]["strategy"]
    if not name or config["experiment"] not in _TRAINING:
        return config
    settings, flat = find_strategy(name).settings, flat_config(config)
    if config["experiment"] == "extract" and "experiment" not in settings:
        raise UserError(
            f"transfer.strategy={name} trains the network, and experiment=extract reads it as it "
            "is: use configs/finetune.py, or the strategy probe or knn"
        )
    if config["experiment"] == "traditional" and "traditional.features" not in settings:
        raise UserError(
            f"transfer.strategy={name} is for a network, and experiment=traditional has none: use "
            "configs/finetune.py, or a strategy such as hog_svm"
        )
    for key, value in settings.items():
        if key in given and flat[key] != value:
            instead = f", or name {name.partition('@')[0]}@{flat[key]}" * (key == _ALPHA)
            raise UserError(
                f"{key}={flat[key]!r} has no effect: transfer.strategy={name} sets it to "
                f"{value!r}; leave one of the two out{instead}"
            )
    return nested_config(config, {**flat, **settings})
