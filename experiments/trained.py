"""The model of an earlier run, taken from its folder, which may come from anybody."""

import dataclasses
import hashlib
import numbers
import pathlib

import flax.linen as nn
import jax
import numpy as np

from experiments import settings, study
from medtl_jax import runs
from medtl_jax.errors import UserError
from medtl_jax.files import is_text, user_path
from medtl_jax.models.registry import ModelSpec, variable_shapes
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.loop import best_epoch

# What a trained model brings with it; a command that uses it cannot set these anew.
_OF_THE_RUN = ("model", "transfer", "optim", "augment")


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


def take_over(config: dict) -> dict:
    """`config` with the sections that belong to the model from `config.eval.run`.

    Raises:
      UserError: there is no such run, or a setting of those sections was changed on the command
        line or in the study, where it could have no effect.
    """
    folder = run_folder(config)
    earlier = runs.read_json(folder / runs.CONFIG)
    settings.check_config(earlier, str(folder / runs.CONFIG))
    settings.check_ranges(earlier)
    for section in _OF_THE_RUN:
        asked, usual, used = (
            runs.flat_config(part, f"{section}.")
            for part in (config[section], settings.default_section(section), earlier[section])
        )
        for key, value in asked.items():
            if value not in (usual[key], used[key]):
                raise UserError(
                    f"{key}={value!r} has no effect: the model of {folder} has {used[key]!r}; "
                    "leave it out"
                )
    return {**config, **{section: earlier[section] for section in _OF_THE_RUN}}


def open_run(folder: pathlib.Path) -> TrainedModel:
    """The best checkpoint in the run folder. UserError if there is none to be used."""
    config = runs.read_json(folder / runs.CONFIG)
    classes, channels, weights = _read_card(folder)
    study.check_image_size(config)
    network, spec = study.make_model(config, len(classes))
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
        network, spec, variables, classes, channels, depth, epoch, weights, digest.hexdigest()
    )


def _read_card(folder: pathlib.Path) -> tuple[tuple[str, ...], int, dict]:
    """Classes, channels and weights from `environment.json`, each checked."""
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
    if not valid:
        raise UserError(f"{path} was not written by a training run of this version")
    return tuple(classes), data["channels"], weights


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
