"""The model of an earlier run, taken from its folder, which may come from anybody."""

import dataclasses
import hashlib
import numbers
import pathlib
from collections.abc import Set

import flax.linen as nn
import jax
import numpy as np

from experiments import settings, study
from medtl_jax import runs
from medtl_jax.data.catalog import SPLITS
from medtl_jax.errors import UserError
from medtl_jax.files import is_text, user_path
from medtl_jax.models.inputs import InputSpec
from medtl_jax.models.registry import ModelSpec, variable_shapes
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.loop import best_epoch
from medtl_jax.weights.pretrained import parse_input

# What a trained model brings with it; a command that uses it cannot set these anew.
_OF_THE_MODEL = ("model.", "transfer.", "optim.", "augment.")
# What decides which images of a set are in train and which in val.
_OF_THE_SPLITS = (
    "data.per_class",
    "data.val_fraction",
    "data.seed_split",
    "data.csv_",
    *(f"data.phantom.{split}" for split in SPLITS),
)


@dataclasses.dataclass(frozen=True)
class Card:
    """What `environment.json` of a training run says that its checkpoints do not.

    Attributes:
      classes: what the outputs stand for.
      channels: of the images that it was trained on, 1 or 3.
      weights: how its pretrained weights were loaded, as `study.weights_card`.
      input: what the network reads.
    """

    classes: tuple[str, ...]
    channels: int
    weights: dict
    input: InputSpec


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """The best checkpoint of a finished or interrupted run, ready to predict.

    Attributes:
      network, spec, variables: the model.
      classes: what its outputs stand for.
      channels: of the images that it was trained on, 1 or 3.
      bit_depth: of the 16-bit files that it was trained on.
      epoch: of the checkpoint.
      weights: how the run's own pretrained weights were loaded, as its environment says.
      sha256: of the checkpoint's values.
    """

    network: nn.Module
    spec: ModelSpec
    variables: dict
    classes: tuple[str, ...]
    channels: int
    bit_depth: int
    epoch: int
    weights: dict
    sha256: str


def run_folder(config: dict) -> pathlib.Path:
    """The folder that `config.eval.run` names."""
    if not config["eval"]["run"]:
        raise UserError("eval.run is empty: name the run folder whose checkpoint to use")
    return user_path(config["eval"]["run"], "eval.run")


def take_model(config: dict, given: Set[str]) -> dict:
    """`config` with the sections that belong to the model from the run `config.eval.run`.

    Values of the study's file give way to those of the run.

    Args:
      config: of a command that uses the run.
      given: the keys (`"model.name"`) that were set on the command line.

    Raises:
      UserError: there is no such run, or a key of `given` has another value there, so that it
        could have no effect.
    """
    folder = run_folder(config)
    used = runs.flat_config(_run_config(folder))
    why = "has no effect: the model of {folder} has {used!r}; leave it out"
    return _take(config, used, given, _OF_THE_MODEL, folder, why)


def take_splits(config: dict, given: Set[str]) -> dict:
    """`config` with what makes `train` and `val` of the run's own data as the run had it.

    Other data than the run's are divided as `config` says.

    Raises:
      UserError: as `take_model`.
    """
    folder = run_folder(config)
    earlier = _run_config(folder)
    if not _same_source(config["data"], earlier["data"]):
        return config
    why = (
        "could score images as val that the model of {folder} was trained on: that run had "
        "{used!r}; leave it out"
    )
    return _take(config, runs.flat_config(earlier), given, _OF_THE_SPLITS, folder, why)


def _run_config(folder: pathlib.Path) -> dict:
    config = runs.read_json(folder / runs.CONFIG)
    settings.check_config(config, str(folder / runs.CONFIG))
    settings.check_ranges(config)
    return config


def _same_source(here: dict, there: dict) -> bool:
    """Whether two sections `data` name the same set of images."""
    try:
        places = [user_path(data["dir"], "data.dir").resolve() for data in (here, there)]
    # A NUL in the text, a loop of links: no place at all.
    except (ValueError, OSError, RuntimeError):
        return False
    return here["name"] == there["name"] and places[0] == places[1]


def _take(
    config: dict,
    used: dict,
    given: Set[str],
    prefixes: tuple[str, ...],
    folder: pathlib.Path,
    why: str,
) -> dict:
    """`config` with the values `used` of the keys that begin with one of `prefixes`."""
    flat = runs.flat_config(config)
    taken = {key: used[key] for key in flat if key.startswith(prefixes)}
    for key, value in taken.items():
        if key in given and flat[key] != value:
            raise UserError(f"{key}={flat[key]!r} {why.format(folder=folder, used=value)}")
    return _nested(config, {**flat, **taken})


def _nested(sections: dict, flat: dict, prefix: str = "") -> dict:
    """The values of `flat` in the order and the depth of `sections`."""
    return {
        key: _nested(value, flat, f"{prefix}{key}.")
        if isinstance(value, dict)
        else flat[prefix + key]
        for key, value in sections.items()
    }


def begun_card(folder: pathlib.Path) -> Card | None:
    """What the training in `folder` began with; None where it has no checkpoint to go on from.

    A damaged checkpoint is none here: who restores it says what is wrong.
    """
    if not (folder / "checkpoints").is_dir():
        return None
    try:
        with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
            checkpoints.history()
    except UserError:
        return None
    return read_card(folder)


def open_run(folder: pathlib.Path) -> TrainedModel:
    """The best checkpoint in the run folder. UserError if there is none to be used."""
    config = runs.read_json(folder / runs.CONFIG)
    card = read_card(folder)
    study.check_image_size(config)
    network, spec = study.make_model(config, len(card.classes), card.input)
    shapes = variable_shapes(network, config["model"]["image_size"])
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        history = _check_history(checkpoints.history(), config["train"]["select"], folder)
        epoch = best_epoch(history, config["train"]["select"])
        variables = checkpoints.restore_best(epoch, shapes)
    depth = config["data"]["bit_depth"]
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(variables):
        digest.update(np.asarray(leaf).tobytes())
    return TrainedModel(
        network,
        spec,
        variables,
        card.classes,
        card.channels,
        depth,
        epoch,
        card.weights,
        digest.hexdigest(),
    )


def read_card(folder: pathlib.Path) -> Card:
    """The card in `environment.json`, checked. UserError where it is none of ours."""
    path = folder / runs.ENVIRONMENT
    environment = runs.read_json(path)
    data, weights = environment.get("data"), environment.get("weights")
    classes = data.get("classes") if isinstance(data, dict) else None
    valid = (
        isinstance(classes, list)
        and 2 <= len(classes) <= 100_000
        and all(is_text(name) for name in classes)
        and len(set(classes)) == len(classes)
        and type(data.get("channels")) is int
        and data["channels"] in (1, 3)
        and isinstance(weights, dict)
        and all(is_text(weights.get(key)) for key in ("name", "sha256", "report"))
    )
    try:
        read = parse_input(weights.get("input")) if valid else None
    except ValueError:
        read = None
    if read is None or data["channels"] not in (1, read.channels):
        raise UserError(f"{path} was not written by a training run of this version")
    return Card(tuple(classes), data["channels"], weights, read)


def _check_history(history, select: str, folder: pathlib.Path) -> list[dict]:
    key = f"val_{select}"
    valid = isinstance(history, list) and all(
        isinstance(record, dict)
        and record.get("epoch") == number
        and (key in record and (record[key] is None or isinstance(record[key], numbers.Real)))
        for number, record in enumerate(history, 1)
    )
    if not valid:
        raise UserError(f"{folder / 'checkpoints'} holds no epoch records of this version")
    return history
