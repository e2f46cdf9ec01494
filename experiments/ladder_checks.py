"""What would stop a run of a study of many, found before the first of them trains."""

import itertools
from collections.abc import Sequence

import numpy as np

from experiments import source, study
from experiments.cells import Cell
from experiments.domain_settings import own_groups
from experiments.ladder_requests import Memos, Quiet, cell_request, named
from experiments.ladder_results import check_same
from experiments.options import (
    check_options_without_data,
    check_retention,
    check_traditional_task,
    group_table,
    loop_settings,
)
from experiments.prepared import make_mesh, read_training_data
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.data.catalog import Dataset, Split
from medtl_jax.errors import UserError
from medtl_jax.models.registry import create_model
from medtl_jax.objectives.task import Task, check_select, make_task, make_terms, sampling_groups
from medtl_jax.report.ladder import percent
from medtl_jax.training.selection import check_validation
from medtl_jax.transfer.features import cache_start
from medtl_jax.transfer.optim import make_schedules
from medtl_jax.transfer.phases import parse_phases
from medtl_jax.transfer.vectors import check_vectors
from medtl_jax.weights.pretrained import Pretrained

# By `_weights_key`.
Weights = dict[tuple[str, str], Pretrained | None]


def check_cells(cells: Sequence[Cell], request: Request, memos: Memos) -> None:
    """UserError for a run that could not be begun, or that would not fit those that are finished.

    Every strategy is checked at every fraction, with all settings that its runs have. Of the seeds
    that draw, the others than the first one are looked at for the smallest fraction alone: a larger
    draw holds the smaller ones.

    Args:
      cells: of the study, by fraction.
      request: of the study.
      memos: where the data that are read are kept.
    """
    missing = [cell for cell in cells if not runs.is_finished(cell.folder(request.folder))]
    if not missing:
        return
    opened: Weights = {}
    first_of: dict[tuple[str, str], Cell] = {}
    for cell in missing:
        first_of.setdefault((cell.strategy, repr(dict(cell.sets))), cell)
    for cell in first_of.values():
        with named(cell):
            _check_settings(cell, request, opened)
    _check_finished(cells, request, memos, opened)
    _check_data(missing, request, memos, opened)


def _check_finished(cells: Sequence[Cell], request: Request, memos: Memos, opened: Weights) -> None:
    """UserError where finished runs were made with other images or weights than there are now."""
    images = {}
    for cell in cells:
        if runs.is_finished(cell.folder(request.folder)):
            with named(cell):
                dataset = read_training_data(cell_request(cell, request, memos))
            images = {cell.draw: dataset.checksum()}
            break
    digests = (weights.file.sha256 for weights in opened.values() if weights)
    check_same(request.folder, cells, images, next(digests, None))


def _check_data(missing: Sequence[Cell], request: Request, memos: Memos, opened: Weights) -> None:
    """UserError for draws that the runs `missing` could not learn from."""
    first = request.config["seed"]
    begun = (request.folder / runs.CONFIG).is_file()
    by_draw = itertools.groupby(sorted(missing, key=lambda cell: cell.draw), lambda c: c.draw)
    for (fraction, seed, _), group in by_draw:
        if fraction > missing[0].fraction and seed != first:
            continue
        members = list(group)
        with named(members[0]):
            dataset = read_training_data(cell_request(members[0], request, memos))
        for cell in members:
            with named(cell):
                weights = opened[_weights_key(cell)]
                _check_set(cell, dataset, weights, begun)


def _check_settings(cell: Cell, request: Request, opened: Weights) -> None:
    """UserError for what needs no image to be seen; the weights are added to `opened`."""
    config, weights = cell.resolved, _weights_key(cell)
    model, transfer = config["model"], config["transfer"]
    _check_probed(cell, config["task"])
    check_options_without_data(config)
    make_mesh(config)
    if weights not in opened:
        quiet = Quiet(request.console, cell, cell.folder(request.folder))
        opened[weights] = study.open_weights(config, quiet)
    check_retention(config, source.source_task(config, opened[weights]))
    table = group_table(config)
    parse_phases(transfer["phases"], table)
    if transfer["cache"] == "prefix":
        options = {"auxiliary": model["auxiliary"] > 0, "decoder": study.decoder_widths(config)}
        cache_start(*create_model(model["name"], 1, **options), table)


def _weights_key(cell: Cell) -> tuple[str, str]:
    """The network, and the weights that it has."""
    model = cell.resolved["model"]
    return model["name"], model["weights"]


def _is_probed(config: dict) -> bool:
    return config["experiment"] in ("extract", "traditional") or config["transfer"]["probe_first"]


def _check_probed(cell: Cell, task: str) -> None:
    """UserError for features of whole images where the task, `""` if not known, wants masks."""
    if task == "segment" and cell.sets.keys() & {"experiment", "transfer.probe_first"}:
        raise UserError(
            "a segmentation has no one vector an image to probe: leave "
            f"{cell.strategy} out of {cell.listed}"
        )


def _check_set(cell: Cell, dataset: Dataset, weights: Pretrained | None, begun: bool) -> None:
    """UserError for images that the run of `cell` could not learn from.

    `begun` is whether the study's folder is there, whose other settings cannot change any more.
    """
    config, train, val = cell.resolved, dataset.splits["train"], dataset.splits["val"]
    _check_probed(cell, dataset.spec.task)
    if config["experiment"] == "traditional":
        check_traditional_task(dataset.spec.task)
    task = make_task(dataset.spec, train.target, config["train"]["ordinal"])
    check_select(config["train"]["select"], task.name, len(task.classes))
    check_validation(config["train"]["select"], task, val.target)
    study.input_spec(config, train.images.shape[-1], weights)
    if _is_probed(config):
        # The features are not there yet; that they are fit for a probe is the usual case.
        features, val_features = (
            np.arange(len(split), dtype=np.float32)[:, None] for split in (train, val)
        )
        check_vectors(task, features, train.target, val_features, val.target)
    if config["experiment"] == "finetune":
        _check_training(cell, task, train, begun)


def _check_training(cell: Cell, task: Task, train: Split, begun: bool) -> None:
    """UserError for a training by steps that these images do not allow."""
    config, size = cell.resolved, cell.resolved["data"]["batch_size"]
    if size > len(train):
        raise UserError(
            f"data.batch_size={size} is larger than {percent(cell.fraction)}% of the training "
            f"split ({len(train)} images); lower it"
        )
    make_terms(task, train.target, config["train"])
    sampling_groups(task, train.target, config["train"]["sampling"])
    table, settings = group_table(config), loop_settings(config)
    steps = settings.steps(len(train))
    epochs = settings.for_set(steps).epochs
    learning = {*table.values(), *own_groups(config)}
    _check_phases(cell, len(parse_phases(config["transfer"]["phases"], table)), epochs, begun)
    make_schedules(config["optim"], learning, epochs * steps, steps)


def _check_phases(cell: Cell, phases: int, epochs: int, begun: bool) -> None:
    """UserError for fewer epochs than phases, with what can still be changed."""
    if epochs >= phases:
        return
    ways = ["begin another --workdir with more epochs" if begun else "raise train.epochs"]
    if "transfer.phases" in cell.settings:
        ways.insert(0, f"leave {cell.strategy} out of {cell.listed}")
    raise UserError(
        f"transfer.phases: {phases} phases need at least {phases} epochs, and there are {epochs}; "
        f"{', or '.join(ways)}"
    )
