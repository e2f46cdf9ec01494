"""The model of an earlier run, taken from its folder, which may come from anybody."""

import dataclasses
import hashlib
import numbers
import pathlib
from collections.abc import Collection, Set

import jax
import numpy as np

from experiments import settings, study
from experiments.adaptation import for_source, for_target, with_domains
from experiments.domain_settings import run_validator, target_data, wanted
from experiments.ladder_folder import check_one_network
from experiments.study import Fitted
from medtl_jax import runs
from medtl_jax.data.catalog import SPLITS
from medtl_jax.data.readers import locate
from medtl_jax.errors import UserError
from medtl_jax.files import is_text, user_path
from medtl_jax.metrics import calibration
from medtl_jax.metrics.calibration import Calibration
from medtl_jax.models.inputs import InputSpec
from medtl_jax.models.registry import variable_shapes
from medtl_jax.objectives.task import Task
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.selection import best_epoch
from medtl_jax.weights.pretrained import parse_input

# What a trained model brings with it; a command that uses it cannot set these anew.
_OF_THE_MODEL = ("task", "model.", "transfer.", "optim.", "augment.", "domain.", "train.ordinal")
# How the model's images were read, which it takes along unless another way is asked for.
_OF_THE_IMAGES = ("bit_depth", "window", "plane", "slices")
# What decides which images of a table without splits are for test.
_OF_THE_TEST = (
    "data.seed_split",
    "data.test_fraction",
    "data.folds",
    "data.fold",
    "data.csv_path_",
    "data.csv_where",
    "data.csv_split_column",
    "data.csv_label_column",
    "data.csv_patient_column",
    "data.dicom_patient",
    "data.patient_pattern",
    "data.plane",
)
# What decides which images of a set are in train and which in val.
_OF_THE_SPLITS = (
    *_OF_THE_TEST,
    "data.per_class",
    "data.train_fraction",
    "data.seed_draw",
    "data.val_fraction",
    *(f"data.phantom.{split}" for split in SPLITS),
)


@dataclasses.dataclass(frozen=True)
class Card:
    """What `environment.json` of a training run says that its checkpoints do not.

    Attributes:
      task: what the outputs stand for.
      channels: of the images that it was trained on, 1 or 3.
      source: of these images, as `DataSpec.source`.
      weights: how its pretrained weights were loaded, as `study.weights_card`.
      input: what the network reads.
      classifier: task of the weights' own classifier, where it stayed in the network.
    """

    task: Task
    channels: int
    source: str
    weights: dict
    input: InputSpec
    classifier: Task | None = None


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """The best checkpoint of a finished or interrupted run, ready to predict.

    Attributes:
      fitted: the network with its variables and its task.
      channels: of the images that it was trained on, 1 or 3.
      epoch: of the checkpoint.
      weights: how the run's own pretrained weights were loaded, as its environment says.
      sha256: of the checkpoint's values.
    """

    fitted: Fitted
    channels: int
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

    Values of the study's file give way to those of the run. So do the keys that say how files are
    read (bit depth, window, plane, slices) and are not `given`: the model's images were made so.

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
    config = _take(config, used, given, _OF_THE_MODEL, folder, why)
    kept = [key for key in _OF_THE_IMAGES if f"data.{key}" not in given]
    return {**config, "data": {**config["data"], **{key: used[f"data.{key}"] for key in kept}}}


def take_splits(config: dict, given: Set[str], splits: Collection[str]) -> dict:
    """`config` with what makes the `splits` of the run's own data as the run had it.

    Other data than the run's are divided as `config` says.

    Raises:
      UserError: as `take_model`.
    """
    if not is_own_data(config):
        return config
    folder = run_folder(config)
    earlier = _run_config(folder)
    held_out = "val" if {"train", "val"} & set(splits) else "test"
    why = (
        f"could score images as {held_out} that the model of {{folder}} was trained on: that run "
        "had {used!r}; leave it out"
    )
    keys = _deciding(earlier["data"], splits)
    return _take(config, runs.flat_config(earlier), given, keys, folder, why)


def is_own_data(config: dict) -> bool:
    """Whether `config.data` names the set of images of the run `config.eval.run`."""
    folder = run_folder(config)
    earlier = _run_config(folder)
    return same_source(config["data"], earlier["data"], read_card(folder).source)


def is_of_source(config: dict) -> bool:
    """Whether `config.data` names the set that the run `config.eval.run` learned from with labels.

    Phantoms are one set, but the scanner that the run was adapted to is its target; and so are the
    rows of a table that it was adapted to.
    """
    if not is_own_data(config):
        return False
    earlier = _run_config(run_folder(config))
    if not wanted(earlier):
        return True
    data, target = config["data"], target_data(earlier)
    if not same_source(data, target):
        return True
    if data["name"] == "phantom":
        return data["phantom"]["domain"] != target["phantom"]["domain"]
    return data["csv_where"] != target["csv_where"]


def _deciding(data: dict, splits: Collection[str]) -> tuple[str, ...]:
    """The beginnings of the keys that decide which images of a set are in `splits`."""
    if {"train", "val"} & set(splits):
        return _OF_THE_SPLITS
    # Other sets than tables have a test split of their own.
    if data["name"] != "csv":
        return ("data.dicom_patient", "data.patient_pattern") if data["name"] == "folder" else ()
    if not data["csv_split_column"]:
        return _OF_THE_TEST
    # Known patients stay known: the intervals resample them.
    patients = ("data.csv_patient_column",) if data["csv_patient_column"] else ()
    return ("data.csv_split_column", "data.dicom_patient", "data.patient_pattern", *patients)


def _run_config(folder: pathlib.Path) -> dict:
    config = settings.with_added_keys(runs.read_json(folder / runs.CONFIG))
    check_one_network(folder, config)
    settings.check_config(config, str(folder / runs.CONFIG))
    settings.check_ranges(config)
    return config


def division_of_source(config: dict) -> dict:
    """The keys of `config.data` by which the run that made the weights divided the source.

    Images that it trained on must not be tested on. Nothing where `config.model.weights` is no
    run on `config.transfer.source`: that is then divided by the keys of the target. A run of an
    earlier version may lack some keys.
    """
    folder, named = pathlib.Path(config["model"]["weights"]), config["transfer"]["source"]
    if not named["name"] or not (folder / runs.CONFIG).is_file():
        return {}
    data = {**config["data"], **named}
    earlier = runs.read_json(folder / runs.CONFIG).get("data")
    if not isinstance(earlier, dict):
        raise UserError(f"{folder / runs.CONFIG} has no section data: not written by medtl_jax")
    # The file may come from anybody.
    earlier = {key: earlier.get(key) for key in data if type(earlier.get(key)) is type(data[key])}
    if not {"name", "dir"} <= earlier.keys() or not same_source(data, {**data, **earlier}):
        return {}
    names = tuple(key.removeprefix("data.") for key in _OF_THE_SPLITS)
    return {key: value for key, value in earlier.items() if key.startswith(names)}


def same_source(here: dict, there: dict, read: str = "") -> bool:
    """Whether two sections `data` name the same set of images, under whatever names.

    Args:
      here, there: the sections.
      read: what was read by the second one, as `DataSpec.source`: the version of a TFDS set, say,
        that was the newest then.
    """
    if "phantom" in (here["name"], there["name"]):
        return here["name"] == there["name"]
    place = _place(here)
    past = {"name": "folder", "dir": read}
    return place is not None and (place == _place(there) or (read != "" and place == _place(past)))


def _place(data: dict) -> pathlib.Path | None:
    try:
        return locate(data)
    # No such set; a NUL in the text, a loop of links: no place at all.
    except (UserError, ValueError, OSError, RuntimeError):
        return None


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
    return runs.nested_config(config, {**flat, **taken})


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


def open_run(folder: pathlib.Path, *, of_source: bool = False) -> TrainedModel:
    """The best checkpoint in the run folder. UserError if there is none to be used.

    Of a run that has adapted it is the network for the target or, `of_source`, that with the batch
    statistics of the source.
    """
    config = settings.with_added_keys(runs.read_json(folder / runs.CONFIG))
    if config["experiment"] == "extract" and config["probe"]["kind"] == "knn":
        raise UserError(
            f"{folder}: a k-NN run has no network to evaluate or to predict with; name a run with "
            "probe.kind=linear, or one that was trained"
        )
    if config["experiment"] == "traditional":
        raise UserError(
            f"{folder}: a traditional run keeps no model to evaluate or to predict with; name a "
            "run that trained a network"
        )
    card = read_card(folder)
    if not study.fits_task(config, card.task.name):
        raise UserError(
            f"{folder / runs.CONFIG} is for the task {config['task']!r}, "
            f"{folder / runs.ENVIRONMENT} for {card.task.name!r}: they are not of one run"
        )
    study.check_image_size(config)
    network, spec = study.make_model(config, card.task, card.input, card.classifier)
    kept = with_domains(config, network)
    shapes = variable_shapes(kept, config["model"]["image_size"])
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        select = config["train"]["select"]
        if select not in card.task.selection:
            raise UserError(f"{folder / runs.CONFIG}: train.select={select!r} is none of the task")
        validator = run_validator(config, card.task)
        history = _check_history(checkpoints.history(), validator.key, folder)
        epoch = best_epoch(history, validator)
        best = checkpoints.restore_best(epoch, shapes)
    variables = for_source(best) if of_source else for_target(config, best)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(variables):
        digest.update(np.asarray(leaf).tobytes())
    return TrainedModel(
        Fitted(network, spec, variables, card.task),
        card.channels,
        epoch,
        card.weights,
        digest.hexdigest(),
    )


def read_card(folder: pathlib.Path) -> Card:
    """The card in `environment.json`, checked. UserError where it is none of ours."""
    path = folder / runs.ENVIRONMENT
    environment = runs.read_json(path)
    data, weights = environment.get("data"), environment.get("weights")
    try:
        if not isinstance(data, dict) or not isinstance(weights, dict):
            raise ValueError("no data or no weights")
        if not all(is_text(weights.get(key)) for key in ("name", "sha256", "report")):
            raise ValueError("weights without a name")
        task, read = Task.from_card(environment.get("task")), parse_input(weights.get("input"))
        if not all(map(is_text, task.classes)):
            raise ValueError("classes that cannot be written")
        classifier = weights.get("source")
        classifier = None if classifier is None else Task.from_card(classifier)
        channels = data.get("channels")
        if not is_text(data.get("source")):
            raise ValueError("data of no source")
        if (
            type(channels) is not int
            or channels not in (1, 3)
            or channels not in (1, read.channels)
        ):
            raise ValueError("channels")
    except ValueError:
        raise UserError(f"{path} was not written by a training run of this version") from None
    return Card(task, channels, data["source"], weights, read, classifier)


def read_calibration(folder: pathlib.Path, task: Task) -> Calibration | None:
    """What the run fitted on its validation split; None for a run that was interrupted."""
    path = folder / runs.CALIBRATION
    if not path.exists():
        return None
    return calibration.from_json(task.name, runs.read_json(path), task.classes, str(path))


def _check_history(history, key: str, folder: pathlib.Path) -> list[dict]:
    valid = isinstance(history, list) and all(
        isinstance(record, dict)
        and record.get("epoch") == number
        and (key in record and (record[key] is None or isinstance(record[key], numbers.Real)))
        for number, record in enumerate(history, 1)
    )
    if not valid:
        raise UserError(f"{folder / 'checkpoints'} holds no epoch records of this version")
    return history
