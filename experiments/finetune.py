"""Fine-tunes a network on a data set and reports on the test split."""

import dataclasses

import jax

from experiments import reporting, study
from experiments.settings import default_section
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.augment.policy import make_augment
from medtl_jax.data.catalog import Dataset
from medtl_jax.data.loader import steps_per_epoch
from medtl_jax.models.registry import model_spec
from medtl_jax.objectives.task import class_weights, cross_entropy
from medtl_jax.report.predict import predict_splits
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.devices import DataMesh, check_batch_size, data_mesh
from medtl_jax.training.inference import make_predict
from medtl_jax.training.loop import LoopSettings, best_epoch, check_splits, fit
from medtl_jax.training.step import StepParts, TrainState, create_state, evaluation_variables
from medtl_jax.transfer.groups import assign_stages, label_tree
from medtl_jax.transfer.optim import Schedule, make_optimizer, make_schedules
from medtl_jax.weights.sources import find_weights


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


def resolve(config: dict) -> dict:
    """The config as it takes effect.

    Without pretrained weights there is nothing to keep or to move slowly: unless the study has
    groups of its own, every stage is then in the group `high`.
    """
    groups = config["transfer"]["groups"]
    if config["model"]["weights"] != "none" or groups != default_section("transfer")["groups"]:
        return config
    groups = {"frozen": "", "low": "", "high": ".*"}
    return {**config, "transfer": {**config["transfer"], "groups": groups}}


def run(request: Request) -> None:
    """Trains, or continues, the run of `request`; UserError before anything is written."""
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
    train = config["train"]
    settings = LoopSettings(
        epochs=train["epochs"],
        min_steps=train["min_steps"],
        batch_size=config["data"]["batch_size"],
        patience=train["patience"],
        select=train["select"],
        seed=config["seed"],
    )
    mesh = data_mesh(train["devices"])
    check_batch_size("data.batch_size", settings.batch_size, mesh)
    check_batch_size("eval.batch_size", config["eval"]["batch_size"], mesh)
    spec = model_spec(config["model"]["name"])
    table = assign_stages((*spec.stages, spec.head), config["transfer"]["groups"])
    augment = make_augment(config["augment"])
    if config["model"]["weights"] != "none":
        find_weights(spec.name, config["model"]["weights"])
    dataset = study.read_data(config, console)
    labels, classes = dataset.splits["train"].labels, dataset.spec.classes
    check_splits(dataset, settings)
    steps = steps_per_epoch(len(labels), settings.batch_size)
    settings = settings.for_set(steps)
    console.note(f"training: {settings.epochs} epochs of {steps} steps")
    schedules = make_schedules(config["optim"], set(table.values()), settings.epochs * steps, steps)
    network, spec = study.make_model(config, len(classes))
    variables, report = study.initial_variables(network, spec, config["model"], config["seed"])
    console.note(f"weights: {report}" if report else "weights: none, every stage starts at random")
    console.note("groups: " + ", ".join(f"{stage} {group}" for stage, group in table.items()))
    weights = class_weights(labels, len(classes), train["class_weights"])
    tree = label_tree(variables["params"], table)
    parts = StepParts(
        model=network,
        spec=spec,
        optimizer=make_optimizer(config["optim"], tree, schedules),
        table=table,
        terms=((1.0, cross_entropy(weights, train["label_smoothing"])),),
        augment=augment,
        ema_decay=train["ema"],
    )
    environment = study.describe(
        config, dataset, study.weights_card(report, config["model"]["weights"])
    )
    environment["training"] = {"epochs": settings.epochs, "steps_per_epoch": steps}
    return Prepared(
        dataset=dataset,
        parts=parts,
        state=create_state(variables, parts),
        schedules=schedules,
        settings=settings,
        mesh=mesh,
        environment=environment,
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
    predictions = predict_splits(predict, best, dataset, ("val", "test"))
    history = [{**record, "best": record["epoch"] == chosen} for record in history]
    notes = [f"Epoch {chosen} of {len(history)} chosen by validation {settings.select}."]
    reporting.finish(request, prepared.environment, predictions, history, notes)
