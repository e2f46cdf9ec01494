"""Fine-tunes a network on a data set and reports on the test split."""

import dataclasses
from collections.abc import Set

import jax
import numpy as np

from experiments import reporting, study, trained
from experiments.settings import OWN_RATE, default_section
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.augment.policy import make_augment
from medtl_jax.data.catalog import Dataset
from medtl_jax.data.loader import steps_per_epoch
from medtl_jax.models.registry import create_model, model_spec
from medtl_jax.objectives.task import class_weights, cross_entropy
from medtl_jax.report.predict import predict_splits
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.devices import DataMesh, check_batch_size, data_mesh
from medtl_jax.training.inference import make_predict
from medtl_jax.training.loop import LoopSettings, best_epoch, check_splits, fit
from medtl_jax.training.step import StepParts, TrainState, create_state, evaluation_variables
from medtl_jax.transfer.groups import assign_stages, check_loaded, default_groups, label_tree
from medtl_jax.transfer.optim import Schedule, make_optimizer, make_schedules
from medtl_jax.weights.pretrained import save_weights


@dataclasses.dataclass(frozen=True)
class Prepared:
    """All that a training needs, checked, before anything is written."""

    dataset: Dataset
    parts: StepParts
    state: TrainState
    schedules: dict[str, Schedule]
    settings: LoopSettings
    mesh: DataMesh
    environment: dict


def resolve(config: dict, given: Set[str] = frozenset()) -> dict:
    """The config as it takes effect, wherever its values were `given`.

    Where the study has no groups of its own they are `default_groups`; without pretrained weights
    there is nothing to keep or to move slowly, and every stage is in the group `high`.
    """
    model, groups = config["model"], config["transfer"]["groups"]
    rates = {key: model[key] for key in ("dropout", "drop_path") if model[key] != OWN_RATE}
    network, spec = create_model(model["name"], 1, auxiliary=model["auxiliary"] > 0, **rates)
    rates = {key: getattr(network, key) for key in ("dropout", "drop_path")}
    if groups == default_section("transfer")["groups"]:
        if model["weights"] == "none":
            groups = {"frozen": "", "low": "", "high": ".*"}
        else:
            groups = default_groups(spec.stages, study.heads(config))
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
    spec = model_spec(config["model"]["name"])
    table = assign_stages((*spec.stages, *study.heads(config)), config["transfer"]["groups"])
    augment = make_augment(config["augment"])
    study.check_image_size(config)
    begun = trained.begun_card(request.folder)
    pretrained = None if begun else study.open_weights(config, console)
    dataset = study.read_data(config, console, config["model"]["in_chans"])
    train, classes = dataset.splits["train"], dataset.spec.classes
    check_splits(dataset, settings)
    steps = steps_per_epoch(len(train), settings.batch_size)
    settings = settings.for_set(steps)
    console.note(f"training: {settings.epochs} epochs of {steps} steps")
    schedules = make_schedules(config["optim"], set(table.values()), settings.epochs * steps, steps)
    read = begun.input if begun else study.input_spec(config, train.images.shape[-1], pretrained)
    network, spec = study.make_model(config, len(classes), read)
    if begun:
        variables, card = study.placeholder_variables(network, config), begun.weights
        console.note("weights: those of the last checkpoint; model.weights is not needed again")
    else:
        variables, report = study.initial_variables(network, config, pretrained, classes)
        check_loaded(table, report.kept if report else (), study.heads(config))
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
        terms=_loss_terms(config, train.labels, len(classes)),
        augment=augment,
        ema_decay=config["train"]["ema"],
    )
    environment = study.describe(config, dataset, card)
    environment["training"] = {"epochs": settings.epochs, "steps_per_epoch": steps}
    state = create_state(variables, parts)
    return Prepared(dataset, parts, state, schedules, settings, mesh, environment)


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


def _loss_terms(config: dict, labels: np.ndarray, classes: int) -> tuple:
    """`(factor, term)` of the head's loss and of each auxiliary head's in use.

    `labels` are those of the training images, int32 `[n]`; `classes` is their number.
    """
    train = config["train"]
    weights = class_weights(labels, classes, train["class_weights"])
    *auxiliary, _ = study.heads(config)
    return (
        (1.0, cross_entropy(weights, train["label_smoothing"])),
        *(
            (config["model"]["auxiliary"], cross_entropy(weights, train["label_smoothing"], name))
            for name in auxiliary
        ),
    )


def train_and_report(request: Request, prepared: Prepared) -> None:
    """Runs the epochs, takes the best one, and writes predictions, figures and report."""
    config, folder, dataset = request.config, request.folder, prepared.dataset
    parts, settings = prepared.parts, prepared.settings
    predict = make_predict(parts.model, parts.spec, prepared.mesh, config["eval"]["batch_size"])
    template = jax.eval_shape(evaluation_variables, prepared.state)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        history = fit(
            prepared.state,
            parts,
            {name: dataset.splits[name] for name in ("train", "val")},
            dataset.spec.classes,
            settings,
            prepared.schedules,
            predict,
            prepared.mesh,
            checkpoints,
            folder,
            request.console,
        )
        chosen = best_epoch(history, settings.select)
        best = checkpoints.restore_best(chosen, template)
    save_weights(folder / runs.WEIGHTS, best, parts.spec, dataset.spec.classes)
    predictions = predict_splits(predict, best, dataset, ("val", "test"))
    history = [{**record, "best": record["epoch"] == chosen} for record in history]
    notes = [f"Epoch {chosen} of {len(history)} chosen by validation {settings.select}."]
    reporting.finish(request, prepared.environment, predictions, history, notes)
