"""Fine-tunes a network on a data set and reports on the test split."""

import dataclasses
import pathlib
from collections.abc import Set

import jax
import numpy as np

from experiments import reporting, study, trained
from experiments.settings import OWN_RATE, default_section, unused_settings
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.augment.policy import make_augment
from medtl_jax.console import Console
from medtl_jax.data.catalog import Array, Dataset
from medtl_jax.data.loader import steps_per_epoch
from medtl_jax.errors import UserError
from medtl_jax.metrics.calibration import FITTED_ON, fit_calibration
from medtl_jax.metrics.thresholds import check_sensitivity
from medtl_jax.models.registry import create_model
from medtl_jax.objectives.task import (
    Task,
    check_options,
    check_select,
    make_task,
    make_terms,
    sampling_groups,
)
from medtl_jax.report.predict import predict_splits
from medtl_jax.report.tensorboard import EventWriter
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.devices import DataMesh, check_batch_size, data_mesh
from medtl_jax.training.inference import make_predict
from medtl_jax.training.loop import LoopSettings, check_splits, fit
from medtl_jax.training.selection import best_epoch
from medtl_jax.training.step import StepParts, TrainState, create_state, evaluation_variables
from medtl_jax.transfer.groups import assign_stages, check_loaded, default_groups, label_tree
from medtl_jax.transfer.optim import Schedule, make_optimizer, make_schedules
from medtl_jax.weights.pretrained import save_weights


@dataclasses.dataclass(frozen=True)
class Prepared:
    """All that a training needs, checked, before anything is written."""

    dataset: Dataset
    task: Task
    groups: np.ndarray | None
    parts: StepParts
    state: TrainState
    schedules: dict[str, Schedule]
    settings: LoopSettings
    mesh: DataMesh
    environment: dict


def resolve(config: dict, given: Set[str] = frozenset()) -> dict:
    """The config as it takes effect, wherever its values were `given`.

    Where the study has no groups of its own they are `default_groups`; without pretrained weights
    there is nothing to keep or to move slowly, and every stage is in the group `high`. A csv with
    masks is a segmentation.
    """
    masks = config["data"]["name"] == "csv" and config["data"]["csv_mask_column"]
    config = {**config, "task": config["task"] or ("segment" if masks else "")}
    model, groups = config["model"], config["transfer"]["groups"]
    rates = {key: model[key] for key in ("dropout", "drop_path") if model[key] != OWN_RATE}
    network, spec = create_model(
        model["name"],
        1,
        auxiliary=model["auxiliary"] > 0,
        decoder=study.decoder_widths(config),
        **rates,
    )
    rates = {key: getattr(network, key) for key in ("dropout", "drop_path")}
    if groups == default_section("transfer")["groups"]:
        if model["weights"] == "none":
            groups = {"frozen": "", "low": "", "high": ".*"}
        else:
            # A decoder reads the early maps too, and they need not be those of photographs.
            freeze = config["task"] != "segment"
            groups = default_groups(spec.stages, study.new_parts(config), freeze)
    return {
        **config,
        "model": {**model, **rates},
        "transfer": {**config["transfer"], "groups": groups},
    }


def run(request: Request) -> None:
    """Trains, or continues, the run of `request`; UserError before anything is written.

    A run that has a checkpoint goes on from there, and its pretrained weights may be gone.
    """
    config, folder = request.config, request.folder
    runs.check_folder(folder, config)
    if runs.is_finished(folder):
        reporting.say_finished(request)
        return
    prepared = prepare(request)
    runs.open_folder(folder, config, prepared.environment)
    with runs.hold(folder):
        train_and_report(request, prepared)


def prepare(request: Request) -> Prepared:
    """Reads data and weights and builds every part; what needs no data is checked first."""
    config, console = request.config, request.console
    settings = _loop_settings(config)
    mesh = data_mesh(config["train"]["devices"])
    check_batch_size("data.batch_size", settings.batch_size, mesh)
    check_batch_size("eval.batch_size", config["eval"]["batch_size"], mesh)
    stages = study.architecture(config).stages
    table = assign_stages((*stages, *study.new_parts(config)), config["transfer"]["groups"])
    augment = make_augment(config["augment"])
    _check_options(config)
    begun = trained.begun_card(request.folder)
    pretrained = None if begun else study.open_weights(config, console)
    dataset = _read_data(config, console)
    train = dataset.splits["train"]
    task = make_task(dataset.spec, train.target, config["train"]["ordinal"])
    terms = _loss_terms(config, task, train.target)
    groups = sampling_groups(task, train.target, config["train"]["sampling"])
    check_splits(dataset, task, settings)
    steps = steps_per_epoch(len(train), settings.batch_size)
    settings = settings.for_set(steps)
    console.note(f"training: {settings.epochs} epochs of {steps} steps")
    schedules = make_schedules(config["optim"], set(table.values()), settings.epochs * steps, steps)
    read = begun.input if begun else study.input_spec(config, train.images.shape[-1], pretrained)
    network, spec = study.make_model(config, task, read)
    if begun:
        variables, card = study.placeholder_variables(network, config), begun.weights
        console.note("weights: those of the last checkpoint; model.weights is not needed again")
    else:
        variables, report = study.initial_variables(network, config, pretrained, task)
        check_loaded(table, report.kept if report else (), study.new_parts(config))
        card = study.weights_card(report, config["model"]["weights"], read)
        console.note(f"weights: {report or 'none, every stage starts at random'}")
    console.note("groups: " + ", ".join(f"{stage} {group}" for stage, group in table.items()))
    parts = StepParts(
        model=network,
        spec=spec,
        optimizer=make_optimizer(
            config["optim"], label_tree(variables["params"], table), schedules
        ),
        table=table,
        terms=terms,
        augment=augment,
        ema_decay=config["train"]["ema"],
    )
    environment = study.describe(request, dataset, task, card)
    environment["training"] = {"epochs": settings.epochs, "steps_per_epoch": steps}
    state = create_state(variables, parts)
    return Prepared(dataset, task, groups, parts, state, schedules, settings, mesh, environment)


def _check_options(config: dict) -> None:
    """UserError for what the data need not be read for, which may take minutes."""
    study.check_image_size(config)
    check_sensitivity(config["eval"]["target_sensitivity"])
    task = config["task"]
    if task:
        check_options(task, config["train"])
        check_select(config["train"]["select"], task)
    if task == "segment":
        study.check_decoder(config)


def _read_data(config: dict, console: Console) -> Dataset:
    """The data set of `config.data`, with notes on settings that it has no use for.

    Images with masks are for a network whose config expects them.
    """
    dataset = study.read_data(config, console, config["model"]["in_chans"])
    if not study.fits_task(config, dataset.spec.task):
        raise UserError(
            f"{dataset.spec.name} has a mask for each image: set --config.task=segment, so that "
            "the network has a decoder"
        )
    for line in unused_settings(config, dataset.spec.task):
        console.note(f"note: {line}")
    return dataset


def _loop_settings(config: dict) -> LoopSettings:
    """How long to train, with what selection."""
    train = config["train"]
    return LoopSettings(
        epochs=train["epochs"],
        min_steps=train["min_steps"],
        batch_size=config["data"]["batch_size"],
        patience=train["patience"],
        select=train["select"],
        seed=config["seed"],
    )


def _loss_terms(config: dict, task: Task, target: Array) -> tuple:
    """`(factor, term)` of the head's loss and of each auxiliary head's in use.

    `target` is that of the training images.
    """
    outputs = ("logits", *study.auxiliary_heads(config))
    terms = make_terms(task, target, config["train"], outputs)
    factors = {"logits": 1.0}
    return tuple(
        (factors.get(name, config["model"]["auxiliary"]), term) for name, term in terms.items()
    )


def _events(folder: pathlib.Path, checkpoints: Checkpoints, steps_per_epoch: int) -> EventWriter:
    """What writes the epochs for TensorBoard, in the place of those after the last checkpoint."""
    epoch = checkpoints.last_epoch()
    return EventWriter(folder / runs.EVENTS, None if epoch is None else epoch * steps_per_epoch + 1)


def train_and_report(request: Request, prepared: Prepared) -> None:
    """Runs the epochs, takes the best one, and writes predictions, figures and report."""
    config, folder, dataset, task = request.config, request.folder, prepared.dataset, prepared.task
    parts, settings = prepared.parts, prepared.settings
    predict = make_predict(parts.model, parts.spec, prepared.mesh, config["eval"]["batch_size"])
    template = jax.eval_shape(evaluation_variables, prepared.state)
    steps = prepared.environment["training"]["steps_per_epoch"]
    with (
        Checkpoints(folder / "checkpoints") as checkpoints,
        _events(folder, checkpoints, steps) as events,
    ):
        history = fit(
            prepared.state,
            parts,
            {name: dataset.splits[name] for name in ("train", "val")},
            task,
            settings,
            prepared.schedules,
            predict,
            prepared.mesh,
            checkpoints,
            folder,
            request.console,
            events.epoch,
            prepared.groups,
        )
        chosen = best_epoch(history, settings.select, task)
        best = checkpoints.restore_best(chosen, template)
    save_weights(folder / runs.WEIGHTS, best, parts.spec, task)
    predictions = predict_splits(predict, best, dataset, task, ("val", "test"))
    calibration = fit_calibration(
        task.name,
        predictions["val"].target,
        predictions["val"].score,
        task.classes,
        config["eval"]["target_sensitivity"],
        predictions["val"].patients,
    )
    history = [{**record, "best": record["epoch"] == chosen} for record in history]
    notes = [f"Epoch {chosen} of {len(history)} chosen by validation {settings.select}."]
    fitted = study.Fitted(parts.model, parts.spec, best, task)
    reporting.finish(
        request, prepared.environment, fitted, predictions, calibration, history, notes, FITTED_ON
    )
