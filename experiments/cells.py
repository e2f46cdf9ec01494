"""One run among the many of a study: its config, its folder, its command; and lists of them."""

import abc
import dataclasses
import importlib
import json
import pathlib
import shlex
from collections.abc import Mapping, Sequence, Set
from types import ModuleType
from typing import Any, ClassVar

from configs import default
from experiments.ladder_folder import FOLDER
from experiments.settings import check_ranges
from experiments.strategies import expand
from medtl_jax import runs
from medtl_jax.errors import UserError

# A study of many runs has neither of the two itself.
_ALWAYS = ("experiment", "model.weights")


@dataclasses.dataclass(frozen=True)
class Cell(abc.ABC):
    """One run of a study of many, which says in a subclass what it calls its parts.

    Attributes:
      strategy: what is compared, by its name.
      fraction: of the training images.
      config: before it is resolved: what a command line would give.
      resolved: as it takes effect.
    """

    strategy: str
    fraction: float
    config: dict
    resolved: dict

    # What the study calls a strategy, and the setting that lists them.
    kind: ClassVar[str] = "strategy"
    listed: ClassVar[str] = ""

    @property
    @abc.abstractmethod
    def group(self) -> str:
        """The beginning of its name, which its seeds have in common."""

    @property
    @abc.abstractmethod
    def sets(self) -> Mapping[str, Any]:
        """The flat keys of the config that its strategy sets."""

    @property
    def of_others(self) -> list[str]:
        """What it notes of settings that are there for other runs of the study."""
        return []

    def words(self, text: str) -> str:
        """What it says, with the settings by which the study has it set them."""
        return text

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.group}-{self.config['seed']}"

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.name

    @property
    def place(self) -> str:
        """Which set of images it learns from: of one place the runs differ in their draws alone."""
        data = self.resolved["data"]
        return json.dumps([data["name"], data["dir"], data["phantom"]["domain"]])

    @property
    def draw(self) -> tuple[float, int, str]:
        """Fraction, seed, place: the runs that have them in common learn from the same images."""
        return self.fraction, self.config["seed"], self.place

    @property
    def made_of(self) -> dict[tuple, tuple[str, ...]]:
        """What it has in common with others of the study -> the sha256 in `environment.json`."""
        found = {("images", *self.draw): ("data_sha256",)}
        if self.resolved["model"]["weights"] != "none":
            found[("weights",)] = ("weights_sha256",)
        return found

    @property
    def experiment(self) -> ModuleType:
        """The module of experiments/ that runs it."""
        return _experiment(self.resolved)

    def folder(self, study: pathlib.Path) -> pathlib.Path:
        """Its run folder in that of the study."""
        return study / FOLDER / self.name

    @property
    def command(self) -> str:
        """The command line that repeats it alone, in a folder of its own."""
        usual = runs.flat_config(default.get_config().to_dict())
        settings = [
            f"--config.{key}={value}"
            for key, value in runs.flat_config(self.config).items()
            if value != usual[key]
        ]
        return f"python launch.py {shlex.join(['--config=configs/default.py', *settings])}"

    @property
    def settings(self) -> dict[str, Any]:
        """What its strategy sets, as it takes effect."""
        flat = runs.flat_config(self.resolved)
        return {key: flat[key] for key in self.sets}


def resolved_config(config: dict, given: Set[str], name: str) -> tuple[dict, dict]:
    """The config of a run with the settings of its `transfer.strategy`, and as it takes effect.

    UserError, with the `name` of the run, for one that cannot be used.
    """
    try:
        expanded = expand(config, given)
        check_ranges(expanded)
        return expanded, _experiment(expanded).resolve(expanded, given)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _experiment(config: dict) -> ModuleType:
    return importlib.import_module(f"experiments.{config['experiment']}")


def listed(config: dict, key: str) -> list[str]:
    """The names in the comma-separated setting `key`, as in `ladder.strategies`."""
    text = runs.flat_config(config)[key]
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise UserError(f"{key}={text!r}: name one or more, comma-separated")
    check_once(key, names)
    return names


def check_once(key: str, names: Sequence[str]) -> None:
    """UserError for a name that is there twice in the setting `key`."""
    for place, name in enumerate(names):
        if name in names[:place]:
            raise UserError(f"{key}: {name} is there twice; leave one out")


def check_different(key: str, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """UserError for two names in the setting `key` that stand for the same settings."""
    names, found = list(settings), list(settings.values())
    for place, one in enumerate(found):
        if one in found[:place]:
            raise UserError(
                f"{key}: {names[place]} is the same as {names[found.index(one)]}; leave one out"
            )


def check_untouched(config: dict, instead: Mapping[str, str], place: str) -> None:
    """UserError for a changed setting that the study sets in each of its runs.

    Args:
      config: of the study.
      instead: key -> the setting to use in its place.
      place: the study, for the message.
    """
    flat, usual = (runs.flat_config(c) for c in (config, default.get_config().to_dict()))
    for key, other in instead.items():
        if flat[key] != usual[key]:
            raise UserError(f"{key}={flat[key]} has no effect in {place}: set {other}")


def overwritten_settings(cells: Sequence[Cell], config: dict) -> list[str]:
    """A note on each setting that the study has changed and that a strategy sets otherwise."""
    flat, usual = (runs.flat_config(c) for c in (config, default.get_config().to_dict()))
    return [
        f"{cell.strategy}: {key}={flat[key]!r} is not used, the {cell.kind} sets it to {value!r}"
        for cell in {cell.strategy: cell for cell in cells}.values()
        for key, value in cell.sets.items()
        if key not in _ALWAYS and flat[key] not in (usual[key], value)
    ]
