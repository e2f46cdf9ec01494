"""From the finished runs of a ladder to its result: means, differences, verdicts, picks, costs."""

import itertools
import json
import math
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from experiments import trained
from experiments.cells import Cell
from experiments.compare import read_run
from experiments.ladder_folder import FOLDER
from experiments.ladder_requests import read_notes
from experiments.strategies import find_strategy
from medtl_jax import runs
from medtl_jax.console import Console
from medtl_jax.errors import UserError
from medtl_jax.files import is_text
from medtl_jax.metrics.pairing import Predicted
from medtl_jax.metrics.seeds import Sampled, difference, judge, over_seeds, pick, sample_runs
from medtl_jax.objectives.task import Task
from medtl_jax.report.ladder import Cost, Ladder, Level, Rung
from medtl_jax.training.selection import best_so_far, task_validator

_MOST_BYTES = 100_000_000
Samples = Mapping[str, Sequence[Sampled]]


def collect(folder: pathlib.Path, cells: Sequence[Cell], config: dict, console: Console) -> Ladder:
    """The result of the finished runs `cells` of the ladder in `folder`.

    Raises:
      UserError: a run is damaged, or they are not of the same weights, data and test images.
    """
    check_same(folder, cells)
    first = cells[0].folder(folder)
    predicted = read_run(first, cells[0].name, "test").predicted
    task, device = trained.read_card(first).task, device_of(first)
    found = (read_run(cell.folder(folder), cell.name, "test").predicted for cell in cells)
    sampled = sampled_runs(found, len(cells), config, console)
    levels = []
    for fraction, group in itertools.groupby(cells, lambda cell: cell.fraction):
        members = list(group)
        levels.append(_level(folder, fraction, members, sampled, config, task))
    strategies = {cell.strategy: cell for cell in cells}
    patients = predicted.patients
    return Ladder(
        levels=tuple(levels),
        summaries={name: find_strategy(name).summary for name in strategies},
        settings={name: cell.settings for name, cell in strategies.items()},
        reference=config["ladder"]["reference"],
        select=config["train"]["select"],
        seeds=config["ladder"]["seeds"],
        images=len(predicted.ids),
        patients=None if patients is None else len(np.unique(patients)),
        device=device,
        notes=notes_of(folder, cells),
    )


def check_same(
    folder: pathlib.Path,
    cells: Sequence[Cell],
    images: Mapping[tuple, str] = MappingProxyType({}),
    weights: str | None = None,
) -> None:
    """UserError unless the finished runs among `cells` were made with the same data and weights.

    Runs of one `Cell.draw` have the same drawn images; all that are pretrained have the same
    weights.

    Args:
      folder: of the study.
      cells: of any state.
      images: sha256 of the data that there are now, by `Cell.draw`, as far as they are known.
      weights: sha256 of the weights' file that there is now, None where it is not known.
    """
    known = {("images", *draw): (digest, None) for draw, digest in images.items()}
    known |= {} if weights is None else {("weights",): (weights, None)}
    for cell in cells:
        path = cell.folder(folder)
        if not runs.is_finished(path):
            continue
        for what, keys in cell.made_of.items():
            digest, key = checked(path / runs.ENVIRONMENT, str, *keys), ".".join(keys)
            other, earlier = known.setdefault(what, (digest, path))
            if digest == other:
                continue
            if earlier is None:
                raise UserError(
                    f"{path} was made with other {what[0]} than there are now ({key} differs); "
                    f"delete {path}, and what is as old, to have it made again"
                )
            raise UserError(
                f"{path} and {earlier} were made with different {what[0]} ({key} differs); delete "
                "the one that is out of date to have it made again"
            )


def notes_of(folder: pathlib.Path, cells: Sequence[Cell]) -> tuple[str, ...]:
    """What the runs noted, each note once with the strategies that it is of.

    Of the notes on the data those that all runs have: the others tell of one draw.
    """
    whose: dict[str, dict[str, None]] = {}
    common: list[str] | None = None
    for cell in cells:
        path = cell.folder(folder)
        ours = lines_of(path / runs.ENVIRONMENT, "data", "notes")
        common = ours if common is None else [note for note in common if note in ours]
        for note in read_notes(path):
            if note not in ours:
                whose.setdefault(note, {})[cell.strategy] = None
    names = len({cell.strategy for cell in cells})
    every = f"all {cells[0].listed.partition('.')[2]}"
    lines = tuple(common or ()) + tuple(
        f"{every if len(found) == names > 1 else ', '.join(found)}: {note}"
        for note, found in whose.items()
    )
    return tuple(map(cells[0].words, lines))


def sampled_runs(
    predicted: Iterable[Predicted], count: int, config: dict, console: Console, **choice
) -> Iterator[Sampled]:
    """The test metrics of each of `count` runs on the same draws; `choice` is of `sample_runs`."""
    options = {"resamples": config["eval"]["resamples"], "seed": config["seed"]}
    with console.progress("intervals") as advance:
        for done, one in enumerate(sample_runs(predicted, **options, **choice), 1):
            advance(done, count, "")
            yield one


def _level(
    folder: pathlib.Path,
    fraction: float,
    cells: Sequence[Cell],
    sampled: Iterator[Sampled],
    config: dict,
    task: Task,
) -> Level:
    """All strategies at one fraction, `cells`; the next of `sampled` are theirs."""
    select = config["train"]["select"]
    rungs, picked = make_rungs(
        folder,
        [[cell] for cell in cells],
        sampled,
        [recorded_validation(cell.folder(folder), select, task) for cell in cells],
        config["ladder"]["reference"],
        config["train"],
        task,
    )
    first = [cell.folder(folder) for cell in cells if cell.strategy == cells[0].strategy]
    sizes = {
        split: tuple(_count(path / runs.ENVIRONMENT, split) for path in first)
        for split in ("train", "val")
    }
    return Level(
        fraction=fraction,
        images=sizes["train"],
        val_images=sizes["val"],
        drawn=fraction < 1 or config["data"]["per_class"] > 0,
        rungs=rungs,
        picked=picked,
    )


def make_rungs(
    folder: pathlib.Path,
    entries: Sequence[Sequence[Cell]],
    sampled: Iterator[Sampled],
    validation: Sequence[float | None],
    reference: str,
    train: Mapping[str, Any],
    task: Task,
) -> tuple[tuple[Rung, ...], str]:
    """What is compared, each with its seeds, and the one that validation picks.

    Args:
      folder: of the study.
      entries: of the study, whose rungs are compared with each other. Each is one seed of a
        strategy: its run, or the runs that predict together.
      sampled: its next are theirs, one for each entry.
      validation: the value `train.select` of each entry.
      reference: the `Cell.strategy` that the others are compared with.
      train: the section of the study's config.
      task: of all.
    """
    folders: dict[str, list[list[pathlib.Path]]] = {}
    samples: dict[str, list[Sampled]] = {}
    values: dict[str, list[float | None]] = {}
    own = itertools.islice(sampled, len(entries))
    for entry, one, value in zip(entries, own, validation, strict=True):
        name = entry[0].strategy
        folders.setdefault(name, []).append([cell.folder(folder) for cell in entry])
        samples.setdefault(name, []).append(one)
        values.setdefault(name, []).append(value)
    against = judge(_differences(samples, reference))
    rungs = tuple(
        Rung(
            strategy=name,
            folders=tuple(f"{FOLDER}/{path.name}" for entry in group for path in entry),
            validation=tuple(values[name]),
            test={metric: over_seeds(samples[name], metric) for metric in samples[name][0].values},
            against=against.get(name, {}),
            cost=_cost(group, train["devices"]),
        )
        for name, group in folders.items()
    )
    return rungs, pick(values, task.selection[train["select"]])


def _differences(samples: Samples, reference: str) -> dict[str, dict]:
    """The differences of all other strategies to the reference, `{strategy: {metric: ...}}`."""
    return {
        name: {metric: difference(found, samples[reference], metric) for metric in found[0].values}
        for name, found in samples.items()
        if name != reference
    }


def recorded_validation(folder: pathlib.Path, select: str, task: Task) -> float | None:
    """The validation value `select` of the epoch that a run kept."""
    validator = task_validator(select, task)
    history = read_history(folder / "metrics.jsonl", [validator.key])
    best = best_so_far(history, validator)
    return None if best is None else history[best - 1][validator.key]


def read_history(path: pathlib.Path, keys: Sequence[str]) -> list[dict]:
    """The epochs of a run, which all have a number, or None, under each of `keys`."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("too large")
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        epochs = [record["epoch"] for record in records]
        if not epochs or epochs != list(range(1, len(epochs) + 1)):
            raise ValueError("epochs are missing")
        values = [record[key] for record in records for key in keys]
        if not all(value is None or _is_number(value) for value in values):
            raise ValueError("no numbers")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise _damaged(path) from None
    return records


def _read(path: pathlib.Path, *keys: str) -> Any:
    """A value deep in a JSON file of a run."""
    value = runs.read_json(path)
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise _damaged(path)
        value = value[key]
    return value


def checked(path: pathlib.Path, kind: type, *keys: str) -> Any:
    """As `_read`, of the type `kind`; text can be written."""
    value = _read(path, *keys)
    if type(value) is not kind or (kind is str and not is_text(value)):
        raise _damaged(path)
    return value


def lines_of(path: pathlib.Path, *keys: str) -> list[str]:
    lines = checked(path, list, *keys)
    if not all(map(is_text, lines)):
        raise _damaged(path)
    return [" ".join(line.split()) for line in lines]


def _count(path: pathlib.Path, split: str) -> int:
    """The images of a split, as the environment of a run says."""
    count = checked(path, int, "data", "images", split)
    if not 0 < count < 2**53:
        raise _damaged(path)
    return count


def _is_number(value: Any) -> bool:
    """Whether `value`, from a JSON file, is a finite number: whole ones may exceed any float."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _amount(path: pathlib.Path, key: str, required: bool = True) -> float | None:
    """A number of at least 0 in `cost.json`, None where it is not known."""
    value = _read(path, key) if required else runs.read_json(path).get(key)
    if value is not None and not (_is_number(value) and value >= 0):
        raise _damaged(path)
    return None if value is None else float(value)


def _damaged(path: pathlib.Path) -> UserError:
    return UserError(f"{path} is damaged; delete {path.parent} to have the run made again")


def device_of(folder: pathlib.Path) -> str:
    """What a run computed with: `CPU`, `GPU` or `TPU`."""
    return checked(folder / runs.ENVIRONMENT, str, "backend").upper()


def data_name(folder: pathlib.Path) -> str:
    """Of the data set of a run."""
    return checked(folder / runs.ENVIRONMENT, str, "data", "name")


def _cost(seeds: Sequence[Sequence[pathlib.Path]], devices: int) -> Cost:
    """What one seed of a strategy takes, all its runs together, the mean over the seeds.

    None where a run does not say; the memory is that of the largest run.
    """
    costs = [[_run_cost(folder, devices) for folder in folders] for folders in seeds]
    known = [one.step_bytes for entry in costs for one in entry if one.step_bytes is not None]
    return Cost(
        _mean([_total([one.seconds for one in entry]) for entry in costs]),
        _mean([_total([one.device_seconds for one in entry]) for entry in costs]),
        max(known, default=None),
        _mean([_total([one.compile_seconds for one in entry]) for entry in costs]),
    )


def _run_cost(folder: pathlib.Path, devices: int) -> Cost:
    """What a run takes; `devices` is `train.devices`: 0 for all that the machine has."""
    path, environment = folder / runs.COST, folder / runs.ENVIRONMENT
    seconds = _total([_amount(path, key) for key in ("prepare_seconds", "train_seconds")])
    worked = _amount(path, "cpu_seconds")
    if device_of(folder) != "CPU":
        # Processors only wait for the accelerators.
        count = devices or len(checked(environment, list, "devices"))
        worked = None if seconds is None else seconds * count
    compiling = _amount(path, "compile_seconds", required=False)
    return Cost(seconds, worked, _amount(path, "step_bytes"), compiling)


def _total(values: Sequence[float | None]) -> float | None:
    return None if None in values else math.fsum(values)


def _mean(values: Sequence[float | None]) -> float | None:
    total = _total(values)
    return None if total is None else total / len(values)
