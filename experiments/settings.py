"""What a config must look like before any experiment may use it."""

import math
import reprlib

from configs import default
from medtl_jax.data.catalog import TASKS
from medtl_jax.ensemble.members import AUTO, FASTEST
from medtl_jax.ensemble.program import PROGRAMS
from medtl_jax.errors import UserError
from medtl_jax.models.inputs import CONTRASTS
from medtl_jax.runs import flat_config

# In the place of a rate: that of the network's own definition.
OWN_RATE = -1.0
# Of `train.program`: each run by itself.
ALONE = "alone"

_RATE = (0, math.nextafter(1.0, 0.0))
_RANGES = {
    "seed": (0, 2**32 - 1),
    "model.in_chans": (0, 1024),
    "model.auxiliary": (0, 100),
    "data.batch_size": (1, 65_536),
    "data.per_class": (0, 1_000_000),
    "data.train_fraction": (math.ulp(0.0), 1),
    "data.seed_draw": (0, 2**32 - 1),
    "data.cache_gb": (0, math.inf),
    "data.test_fraction": (math.ulp(0.0), _RATE[1]),
    "data.folds": (0, 1000),
    "data.fold": (0, 999),
    "data.bit_depth": (8, 16),
    "data.audit_limit": (0, 1),
    "data.phantom.train": (1, 100_000),
    "data.phantom.val": (1, 100_000),
    "data.phantom.test": (1, 100_000),
    "transfer.layer_decay": (math.ulp(0.0), 1),
    "transfer.alpha": (0, math.inf),
    "transfer.beta": (math.ulp(0.0), math.inf),
    "transfer.temperature": (math.ulp(0.0), math.inf),
    "transfer.views": (0, 1000),
    "transfer.bn.momentum": _RATE,
    "optim.momentum": (0, 1),
    "optim.low.weight_decay": (0, math.inf),
    "optim.low.clip": (0, math.inf),
    "optim.high.weight_decay": (0, math.inf),
    "optim.high.clip": (0, math.inf),
    "optim.discriminator.weight_decay": (0, math.inf),
    "optim.discriminator.clip": (0, math.inf),
    "domain.strength": (0, math.inf),
    "domain.gamma": (0, math.inf),
    "domain.width": (1, 65_536),
    "train.epochs": (1, 100_000),
    "train.min_steps": (0, 10_000_000),
    "train.epoch_steps": (0, 10_000_000),
    "train.patience": (0, 100_000),
    "train.accumulate": (1, 65_536),
    "train.label_smoothing": _RATE,
    "train.focal_gamma": (0, 100),
    "train.logit_adjustment": (0, 100),
    "train.dice": (0, 1000),
    "train.huber_delta": (math.ulp(0.0), math.inf),
    "train.ema": _RATE,
    "train.swa": _RATE,
    "ladder.seeds": (1, 1000),
    "adapt.seeds": (1, 1000),
    "ablation.seeds": (1, 1000),
    "paper.seeds": (1, 1000),
    "ensemble.members": (1, 1000),
    "find_lr.steps": (20, 10_000),
    "find_lr.least": (math.ulp(0.0), math.inf),
    "find_lr.most": (math.ulp(0.0), math.inf),
    "eval.batch_size": (1, 65_536),
    "eval.resamples": (1, 100_000),
    "eval.target_sensitivity": (math.ulp(0.0), 1),
    "eval.surface_tolerance": (0, 1000),
    "eval.tta": (0, 1000),
}
# Settings that only these tasks have; config.train's are refused by `objectives.task`.
_OF_TASKS = {
    "model.decoder": ("segment",),
    "eval.surface_tolerance": ("segment",),
    "eval.target_sensitivity": ("classify", "ordinal", "multilabel"),
}
# Settings that nothing but a training by steps has; epochs, rates and groups are in every study.
_OF_STEPS = (
    "transfer.layer_decay",
    "transfer.cache",
    "train.class_weights",
    "train.sampling",
    "train.label_smoothing",
    "train.focal_gamma",
    "train.logit_adjustment",
    "train.swa",
    "train.accumulate",
    "train.remat",
    "augment.mixup",
    "augment.cutmix",
)
# What is done beside the scores, and the experiments that do it.
_BESIDE = {
    "eval.tta": ("finetune", "evaluate", "predict"),
    "eval.corruptions": ("finetune", "evaluate"),
}
# What several processes do as one, and what in it only one can do, by its usual value: features
# are kept on the machine that computed them, and views and corruptions belong to the report, which
# process 0 makes.
_ACROSS_PROCESSES = ("finetune", "evaluate", "predict")
_OF_ONE_PROCESS = {
    "transfer.cache": ("none", _ACROSS_PROCESSES),
    "transfer.probe_first": (False, _ACROSS_PROCESSES),
    "eval.tta": (0, ("finetune", "evaluate")),
    "eval.corruptions": (False, ("finetune", "evaluate")),
}
# Keys that some earlier version had not, by their beginnings, but for those that all had. Their
# defaults are what it did without them: they are off.
_ADDED = (
    "model.contrast",
    "data.csv_where",
    "data.audit",
    "data.patient_pattern",
    "data.window",
    "data.plane",
    "data.slices",
    "data.dicom_patient",
    "optim.discriminator.",
    "augment.",
    "domain.",
    "adapt.",
    "ablation.",
    "ensemble.",
    "train.program",
    "train.accumulate",
    "train.remat",
    "traditional.",
    "paper.",
    "eval.tta",
    "eval.corruptions",
)
_NOT_ADDED = tuple(
    f"augment.{name}"
    for name in ("flip_horizontal", "flip_vertical", "shift", "brightness", "contrast")
)
_CHOICES = {
    "task": ("", *TASKS),
    "model.compute": ("float32", "bfloat16"),
    "model.contrast": CONTRASTS,
    "data.audit": ("on", "off"),
    "optim.name": ("adamw", "sgd", "rmsprop"),
    "train.class_weights": ("none", "balanced"),
    "train.sampling": ("uniform", "balanced"),
    "train.ordinal": ("corn", "cumulative"),
    "transfer.cache": ("none", "prefix"),
    "train.program": (AUTO, FASTEST, ALONE, *PROGRAMS),
    "domain.bn": ("auto", "source", "own", "adabn"),
    "probe.kind": ("linear", "knn"),
    "traditional.features": ("hog", "lbp", "pixels"),
    "traditional.classifier": ("logistic", "svm", "forest"),
}


def check_config(config: dict, where: str) -> None:
    """UserError unless `config` has the keys of configs/default.py, of its types, in range.

    `where` says whose config it is: a study's, or that of an earlier run.
    """
    _check_section(config, default.get_config().to_dict(), where, "")


def _check_section(found: dict, wanted: dict, where: str, prefix: str) -> None:
    # Section by section, as deep as the defaults are: a flat form would take a key `model.name`
    # at the top for one of the section `model`.
    for key in sorted(found.keys() ^ wanted.keys()):
        fault = "lacks the key" if key in wanted else "has the unknown key"
        raise UserError(f"{where} {fault} {prefix}{key}; start from configs/default.py")
    for key, usual in wanted.items():
        value, name = found[key], prefix + key
        if isinstance(usual, dict):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {name}={reprlib.repr(value)} must be a section of keys")
            _check_section(value, usual, where, f"{name}.")
            continue
        accepted = (float, int) if type(usual) is float else (type(usual),)
        if type(value) not in accepted:
            shown = reprlib.repr(value)
            raise UserError(f"{where}: {name}={shown} must be of the type of {usual!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {name}={value} must be a finite number")


def with_added_keys(config: dict) -> dict:
    """The config of a run of an earlier version, with the keys that were added since, all off.

    What it lacks beside them, or has too much, is left for `check_config` to refuse.
    """
    return _with_added(config, default.get_config().to_dict(), "")


def _with_added(found: dict, wanted: dict, prefix: str) -> dict:
    filled = dict(found)
    for key, usual in wanted.items():
        name, value = prefix + key, found.get(key, {})
        if not isinstance(usual, dict):
            if key not in found and name.startswith(_ADDED) and name not in _NOT_ADDED:
                filled[key] = usual
        elif isinstance(value, dict) and (section := _with_added(value, usual, f"{name}.")):
            filled[key] = section
    return filled


def check_ranges(config: dict) -> None:
    """UserError for a value that would otherwise fail late, after the data have been read."""
    flat = flat_config(config)
    for key, (low, high) in _RANGES.items():
        if not low <= flat[key] <= high:
            limit = " and less than 1" if high == _RATE[1] else f" and at most {high}"
            upper = limit if math.isfinite(high) else ""
            least = "more than 0" if low == math.ulp(0.0) else f"at least {low}"
            raise UserError(f"{key}={flat[key]} must be {least}{upper}")
    for key in ("model.dropout", "model.drop_path"):
        if flat[key] != OWN_RATE and not 0 <= flat[key] < 1:
            raise UserError(
                f"{key}={flat[key]} must be at least 0 and less than 1, or {OWN_RATE:g} for the "
                "network's own"
            )
    for key, known in _CHOICES.items():
        if flat[key] not in known:
            names = ", ".join(name for name in known if name)
            raise UserError(f"{key}={flat[key]!r} is not known; choose from {names}")
    for section in ("data", "domain.target"):
        rows, name = flat[f"{section}.csv_where"], flat[f"{section}.name"]
        if rows and name != "csv":
            raise UserError(
                f"{section}.csv_where={rows} chooses rows of a csv, and {section}.name is "
                f"{name!r}: leave it out"
            )
    for key, experiments in _BESIDE.items():
        if flat[key] and flat["experiment"] not in experiments:
            names = f"{', '.join(experiments[:-1])} and {experiments[-1]}"
            raise UserError(
                f"{key}={flat[key]} is for experiment={names}, not for {flat['experiment']}; leave "
                "it out, and evaluate a finished run with it"
            )


def check_processes(config: dict) -> None:
    """UserError for what several processes do not do as one program."""
    name, flat = config["experiment"], flat_config(config)
    if name not in _ACROSS_PROCESSES:
        raise UserError(
            f"experiment={name} is not run by several processes as one program "
            f"({', '.join(_ACROSS_PROCESSES)} are); leave out --coordinator and --distributed"
        )
    for key, (usual, experiments) in _OF_ONE_PROCESS.items():
        if name in experiments and flat[key] != usual:
            raise UserError(
                f"{key}={flat[key]} is for one process; leave it out, or run without --coordinator "
                "and --distributed"
            )


def unused_settings(config: dict, task: str) -> list[str]:
    """A note on each setting that was changed and does nothing for `task`."""
    flat, usual = flat_config(config), flat_config(default.get_config().to_dict())
    return [
        f"{key}={flat[key]} has no effect: it is for the task {' or '.join(tasks)}"
        for key, tasks in _OF_TASKS.items()
        if task not in tasks and flat[key] != usual[key]
    ]


def unused_by_probe(config: dict) -> list[str]:
    """A note on each setting of a training by steps that was changed, and does nothing here."""
    flat, usual = flat_config(config), flat_config(default.get_config().to_dict())
    kind = "a traditional classifier" if config["experiment"] == "traditional" else "a probe"
    return [
        f"{key}={flat[key]} has no effect: {kind} is not trained by steps"
        for key in _OF_STEPS
        if flat[key] != usual[key]
    ]


def default_section(name: str) -> dict:
    """A section of configs/default.py, to tell what a user has changed."""
    return default.get_config()[name].to_dict()
