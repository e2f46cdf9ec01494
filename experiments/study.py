"""What the experiments share: data, model with its weights, predictions and the report."""

import dataclasses
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medtl_jax import runs
from medtl_jax.console import Console
from medtl_jax.data.catalog import Dataset
from medtl_jax.data.readers import load_dataset
from medtl_jax.errors import UserError
from medtl_jax.keys import named_key
from medtl_jax.metrics.scores import confusion
from medtl_jax.models.registry import (
    ModelSpec,
    create_model,
    initialize,
    model_spec,
    variable_shapes,
)
from medtl_jax.report import figures
from medtl_jax.report.html import write_report
from medtl_jax.report.predict import Predictions, score_splits, write_predictions
from medtl_jax.report.tables import metrics_table
from medtl_jax.training.checkpoint import Checkpoints
from medtl_jax.training.loop import best_epoch
from medtl_jax.weights.merge import MergeReport, load_pretrained

_COMPUTE = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for: the resolved config, where to write, and the command line."""

    config: dict
    folder: pathlib.Path
    command: str
    console: Console


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """The best checkpoint of a finished or interrupted run, ready to predict.

    Attributes:
      config: of that run.
      network, spec, variables: the model.
      classes: what its outputs stand for.
      channels: of the images that it was trained on, 1 or 3.
      epoch: of the checkpoint.
      report: how the run's own pretrained weights were loaded, as its environment says.
    """

    config: dict
    network: nn.Module
    spec: ModelSpec
    variables: dict
    classes: tuple[str, ...]
    channels: int
    epoch: int
    report: dict


def check_ranges(config: dict) -> None:
    """UserError for a number that no experiment can use and that only fails late, or silently."""
    flat = runs.flat_config(config)
    ranges = {"seed": (0, 2**32 - 1), "eval.resamples": (1, 100_000), "optim.momentum": (0, 1)}
    for group in ("low", "high"):
        ranges[f"optim.{group}.weight_decay"] = ranges[f"optim.{group}.clip"] = (0, math.inf)
    for key, (low, high) in ranges.items():
        if not low <= flat[key] <= high:
            upper = f" and at most {high}" if math.isfinite(high) else ""
            raise UserError(f"{key}={flat[key]} must be at least {low}{upper}")


def read_data(config: dict, console: Console, **choice) -> Dataset:
    """The data set of `config.data` at `config.model.image_size`; `choice` as `load_dataset`."""
    spec, size = model_spec(config["model"]["name"]), config["model"]["image_size"]
    if not spec.smallest_input <= size <= 1024:
        raise UserError(
            f"model.image_size={size}: {spec.name} takes {spec.smallest_input} to 1024 pixels"
        )
    with console.progress("data") as advance:
        dataset = load_dataset(config["data"], size, advance, **choice)
    counts = ", ".join(f"{name} {len(split)}" for name, split in dataset.splits.items())
    classes = ", ".join(dataset.spec.classes)
    console.note(f"data: {dataset.spec.name}: {counts} images; classes {classes}")
    for note in dataset.spec.notes:
        console.note(f"note: {note}")
    return dataset


def data_card(dataset: Dataset, image_size: int) -> dict:
    """What the report says of the data, JSON-ready."""
    spec = dataset.spec
    counts = {
        name: {label: int((split.labels == i).sum()) for i, label in enumerate(spec.classes)}
        for name, split in dataset.splits.items()
    }
    known = all(split.patients is not None for split in dataset.splits.values())
    patients = {name: len(np.unique(split.patients)) for name, split in dataset.splits.items()}
    return {
        "name": spec.name,
        "task": spec.task,
        "classes": list(spec.classes),
        "counts": counts,
        "patients": patients if known else None,
        "image_size": image_size,
        "channels": int(next(iter(dataset.splits.values())).images.shape[-1]),
        "licence": spec.licence,
        "source": spec.source,
        "notes": list(spec.notes),
        "sha256": dataset.checksum(),
    }


def make_model(config: dict, num_classes: int) -> tuple[nn.Module, ModelSpec]:
    """The network of `config.model` with a head for `num_classes`."""
    model, momentum = config["model"], config["transfer"]["bn"]["momentum"]
    if not 0 <= momentum < 1:
        raise UserError(f"transfer.bn.momentum={momentum} must lie in 0 <= momentum < 1")
    if model["compute"] not in _COMPUTE:
        raise UserError(f"model.compute={model['compute']!r}: choose float32 or bfloat16")
    for key in ("dropout", "drop_path"):
        if not 0 <= model[key] < 1:
            raise UserError(f"model.{key}={model[key]} must lie in 0 <= rate < 1")
    return create_model(
        model["name"],
        num_classes,
        momentum=momentum,
        dropout=model["dropout"],
        drop_path=model["drop_path"],
        dtype=_COMPUTE[model["compute"]],
    )


def initial_variables(
    network: nn.Module, spec: ModelSpec, model: dict, seed: int
) -> tuple[dict, MergeReport | None]:
    """Variables before training: pretrained with a new head, or all new for `weights=none`."""
    key, size = named_key(jax.random.key(seed), "init"), model["image_size"]
    if model["weights"] == "none":
        return initialize(network, size, key), None
    shapes = variable_shapes(network, size)
    head = initialize(network, size, key, only=lambda name: name == spec.head)
    template = {kind: {**tree, **head[kind]} for kind, tree in shapes.items()}
    variables, report, _ = load_pretrained(
        template, spec.name, model["weights"], dont_load=(f"params/{spec.head}/.*",)
    )
    return variables, report


def weights_card(report: MergeReport | None, name: str) -> dict:
    """What the report says of the pretrained weights, JSON-ready."""
    return {
        "name": name,
        "sha256": report.sha256 if report else "",
        "report": str(report or "no pretrained weights"),
    }


def describe(config: dict, dataset: Dataset, weights: dict) -> dict:
    """The content of `environment.json`."""
    data = data_card(dataset, config["model"]["image_size"])
    return {
        **runs.describe_environment(),
        "data": data,
        "data_sha256": data["sha256"],
        "weights": weights,
        "weights_sha256": weights["sha256"],
    }


def open_run(name: str) -> TrainedModel:
    """The best checkpoint in the run folder `name`. UserError if there is none to be used."""
    if not name:
        raise UserError("eval.run is empty: name the run folder whose checkpoint to use")
    folder = pathlib.Path(name)
    config, environment = (
        runs.read_json(folder / runs.CONFIG),
        runs.read_json(folder / runs.ENVIRONMENT),
    )
    try:
        card = environment["data"]
        classes, channels = tuple(map(str, card["classes"])), card["channels"]
        network, spec = make_model(config, len(classes))
        shapes = variable_shapes(network, config["model"]["image_size"])
        select, weights = config["train"]["select"], environment["weights"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder} was not written by this version: {error!r}") from None
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        epoch = best_epoch(checkpoints.history(), select)
        variables = checkpoints.restore_best(epoch, shapes)
    return TrainedModel(config, network, spec, variables, classes, channels, epoch, weights)


def draw_figures(dataset: Dataset, predictions: Predictions, split: str, metrics: dict) -> dict:
    """The figures of one split: metrics, confusion, ROC and examples."""
    classes, target, score = dataset.spec.classes, predictions.target, predictions.score
    chosen = figures.choose_examples(target, score)
    images = dataset.splits[split].images[chosen]
    return {
        "metrics": figures.metrics_figure(metrics),
        "confusion": figures.confusion_figure(confusion(target, score), classes),
        "roc": figures.roc_figure(target, score, classes, metrics),
        "examples": figures.examples_figure(
            images, target[chosen], score[chosen], classes, predictions.ids[chosen]
        ),
    }


def finish(
    request: Request,
    dataset: Dataset,
    environment: dict,
    predictions: dict[str, Predictions],
    history: list[dict],
    notes: list[str],
) -> None:
    """Writes predictions, figures, report and, last of all, `metrics.json`; prints the table."""
    write_predictions(request.folder / "predictions.npz", predictions)
    metrics = score_splits(
        predictions,
        dataset.spec.classes,
        resamples=request.config["eval"]["resamples"],
        seed=request.config["seed"],
    )
    split = _shown(metrics)
    drawn = draw_figures(dataset, predictions[split], split, metrics[split])
    if history:
        drawn["curves"] = figures.curves_figure(history)
    folder, console = request.folder, request.console
    figures.save_figures(drawn, folder / "figures")
    write_report(
        folder / "report.html",
        title=f"{request.config['experiment']}: {dataset.spec.name}",
        command=request.command,
        config=request.config,
        environment={key: value for key, value in environment.items() if key != "data"},
        data=environment["data"],
        history=history,
        metrics=metrics,
        figures=drawn,
        notes=notes,
    )
    runs.write_json(folder / runs.METRICS, metrics)
    say_result(folder, metrics, console)


def say_result(folder: pathlib.Path, metrics: dict, console: Console) -> None:
    """Prints the table of the last split and where the report is."""
    split = _shown(metrics)
    console.note(f"\n{split} split\n{metrics_table(metrics[split])}")
    console.note(f"\nreport: {folder / 'report.html'}")


def _shown(metrics: dict) -> str:
    return "test" if "test" in metrics else next(reversed(metrics))
