"""What the experiments share: the data, the model with its weights, the environment."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medtl_jax import runs
from medtl_jax.console import Console
from medtl_jax.data.catalog import Dataset
from medtl_jax.data.images import to_grey
from medtl_jax.data.readers import load_dataset
from medtl_jax.errors import UserError
from medtl_jax.keys import named_key
from medtl_jax.models.registry import (
    ModelSpec,
    create_model,
    initialize,
    model_spec,
    variable_shapes,
)
from medtl_jax.weights.merge import MergeReport, load_pretrained

_COMPUTE = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for: the resolved config, where to write, and the command line."""

    config: dict
    folder: pathlib.Path
    command: str
    console: Console


def read_data(config: dict, console: Console, channels: int | None = None, **choice) -> Dataset:
    """The data set of `config.data` at `config.model.image_size`.

    With `channels` = 1, the images of a model trained on grey ones, colour becomes grey as it
    does for `predict`. `choice` are the keywords of `load_dataset`.
    """
    check_image_size(config)
    with console.progress("data") as advance:
        dataset = load_dataset(config["data"], config["model"]["image_size"], advance, **choice)
    if channels == 1:
        grey = {
            name: dataclasses.replace(split, images=to_grey(split.images))
            for name, split in dataset.splits.items()
        }
        dataset = dataclasses.replace(dataset, splits=grey)
    counts = ", ".join(f"{name} {len(split)}" for name, split in dataset.splits.items())
    classes = ", ".join(dataset.spec.classes)
    console.note(f"data: {dataset.spec.name}: {counts} images; classes {classes}")
    for note in dataset.spec.notes:
        console.note(f"note: {note}")
    return dataset


def check_image_size(config: dict) -> None:
    """UserError unless the network can take images of `config.model.image_size`."""
    spec, size = model_spec(config["model"]["name"]), config["model"]["image_size"]
    if not spec.smallest_input <= size <= 1024:
        raise UserError(
            f"model.image_size={size}: {spec.name} takes {spec.smallest_input} to 1024 pixels"
        )


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
    model = config["model"]
    return create_model(
        model["name"],
        num_classes,
        momentum=config["transfer"]["bn"]["momentum"],
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
