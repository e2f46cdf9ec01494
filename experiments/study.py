"""What the experiments share: the data, the model with its weights, the environment."""

import contextlib
import dataclasses
import pathlib
import textwrap
import time
from collections.abc import Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.memory import remembered
from experiments.source import with_source_head
from medtl_jax import runs
from medtl_jax.console import Console
from medtl_jax.data.catalog import Dataset
from medtl_jax.data.readers import load_dataset
from medtl_jax.errors import UserError
from medtl_jax.keys import named_key
from medtl_jax.models.backbone import HEAD_OF_AUXILIARY
from medtl_jax.models.inputs import InputSpec
from medtl_jax.models.registry import (
    ModelSpec,
    create_model,
    initialize,
    model_spec,
    variable_shapes,
)
from medtl_jax.models.unet import parse_widths
from medtl_jax.objectives.task import Task
from medtl_jax.report.datacard import count_targets
from medtl_jax.weights.adapt import adapted_input
from medtl_jax.weights.merge import MergeReport
from medtl_jax.weights.pretrained import (
    Pretrained,
    fill,
    for_channels,
    open_pretrained,
    rescale_heads,
)
from medtl_jax.weights.sources import find_weights

_SHOWN = 12  # class names in an error
_COMPUTE = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass
class Effort:
    """Seconds, of the clock and of the processor, spent before the first step."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def add(self, seconds: float, cpu_seconds: float) -> None:
        """Counts work that was done now, or of which an earlier result is used."""
        self.seconds += seconds
        self.cpu_seconds += cpu_seconds

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Counts what is done inside."""
        started, worked = time.perf_counter(), time.process_time()
        yield
        self.add(time.perf_counter() - started, time.process_time() - worked)


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for: the resolved config, where to write, and the command line.

    Attributes:
      brief: whether figures and report are left out, as in one run of many.
      effort: what features and probes have taken, whoever computed them.
      memo: what was read of one data set, and of a target, so far, for the runs of one process that
        share it; None keeps nothing.
    """

    config: dict
    folder: pathlib.Path
    command: str
    console: Console
    brief: bool = False
    effort: Effort = dataclasses.field(default_factory=Effort)
    memo: dict | None = None


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A network with its variables, and what its outputs stand for.

    `has_head` is False where the network gives features alone, and something else the answers.
    """

    network: nn.Module
    spec: ModelSpec
    variables: dict
    task: Task
    has_head: bool = True


def read_data(
    config: dict,
    console: Console,
    channels: int | None = None,
    memo: dict | None = None,
    **choice,
) -> Dataset:
    """The data set of `config.data` at `config.model.image_size`.

    With `channels` = 1, the images of a model trained on grey ones, colour becomes grey as it
    does for `predict`. `choice` are the keywords of `load_dataset`; the task is `config.task`
    where it is not among them. `memo` is for reads of one set that differ in their draws alone: it
    is decoded once.
    """
    check_image_size(config)
    choice = {"task": config["task"], **choice}
    size = config["model"]["image_size"]

    def read(data: dict) -> Dataset:
        with console.progress("data") as advance:
            return load_dataset(data, size, advance, grey=channels == 1, **choice)

    dataset = read(config["data"]) if memo is None else remembered(config["data"], memo, read)
    spec = dataset.spec
    counts = ", ".join(f"{name} {len(split)}" for name, split in dataset.splits.items())
    console.note(f"data: {spec.name}: {counts} images; {spec.task}: {', '.join(spec.classes)}")
    for note in dataset.spec.notes:
        console.note(f"note: {note}")
    return dataset


def check_image_size(config: dict) -> None:
    """UserError unless the network can take images of `config.model.image_size`."""
    model = config["model"]
    spec, size, least = architecture(config), model["image_size"], 0
    if model["auxiliary"]:
        least = spec.smallest_auxiliary
    if not max(least, spec.smallest_input) <= size <= 1024:
        heads = " with its auxiliary heads" if least > spec.smallest_input else ""
        raise UserError(
            f"model.image_size={size}: {spec.name}{heads} takes "
            f"{max(least, spec.smallest_input)} to 1024 pixels"
        )


def data_card(dataset: Dataset, image_size: int) -> dict:
    """What the report says of the data, JSON-ready."""
    spec = dataset.spec
    targets = {name: split.target for name, split in dataset.splits.items()}
    known = all(split.patients is not None for split in dataset.splits.values())
    patients = {name: len(np.unique(split.patients)) for name, split in dataset.splits.items()}
    return {
        "name": spec.name,
        "task": spec.task,
        "classes": list(spec.classes),
        **count_targets(spec.task, spec.classes, targets),
        "patients": patients if known else None,
        "image_size": image_size,
        "channels": int(next(iter(dataset.splits.values())).images.shape[-1]),
        "licence": spec.licence,
        "source": spec.source,
        "notes": list(spec.notes),
        "sha256": dataset.checksum(),
    }


def open_weights(config: dict, console: Console) -> Pretrained | None:
    """The weights that `config.model.weights` names, downloaded if need be; None for `none`.

    Raises:
      UserError: as `find_weights` and `open_pretrained`; a setting that says how to load weights
        where there are none.
    """
    model = config["model"]
    if model["weights"] == "none":
        for key in ("dont_load", "keep_head"):
            if model[key]:
                raise UserError(
                    f"model.{key}={model[key]!r} has no effect without model.weights; leave it out "
                    "or name weights"
                )
        return None
    with console.progress("weights") as advance:
        path = find_weights(model["name"], model["weights"], advance)
    return open_pretrained(architecture(config), path)


def input_spec(config: dict, channels: int, weights: Pretrained | None) -> InputSpec:
    """What the network reads: `config.model.in_chans` channels, normalised as the weights say.

    Their contrast is enhanced as `config.model.contrast` says, whatever the weights were trained
    on.

    Args:
      channels: of the images, which `in_chans` = 0 asks for. A grey image may be read as three
        equal channels, but not the other way around: `read_data` turns colour into grey.
      weights: None for a network from scratch.
    """
    wanted = config["model"]["in_chans"] or channels
    if channels not in (1, wanted):
        raise UserError(
            f"model.in_chans={wanted}, but the images have {channels} channels; leave it at 0"
        )
    contrast = config["model"]["contrast"]
    if weights is not None:
        return dataclasses.replace(adapted_input(weights.input, wanted), contrast=contrast)
    # Weights that are drawn have no RGB past to make up for.
    own = model_spec(config["model"]["name"]).input
    return dataclasses.replace(adapted_input(own, wanted), offset=False, contrast=contrast)


def make_model(
    config: dict, task: Task, read: InputSpec, source: Task | None = None
) -> tuple[nn.Module, ModelSpec]:
    """The network of `config.model` with a head for `task`, over the input `read`.

    With `source` the classifier of the weights, which is for that task, stays beside it.
    """
    model = config["model"]
    network, spec = create_model(
        model["name"],
        task.outputs,
        in_chans=read.channels,
        decoder=decoder_widths(config),
        offset=read.offset,
        auxiliary=model["auxiliary"] > 0,
        momentum=config["transfer"]["bn"]["momentum"],
        dropout=model["dropout"],
        drop_path=model["drop_path"],
        source_classes=source.outputs if source else 0,
        dtype=_COMPUTE[model["compute"]],
    )
    return network, dataclasses.replace(spec, input=read)


def decoder_widths(config: dict) -> tuple[int, ...]:
    """Channels of the decoder's stages for a segmentation, nothing for another task."""
    return parse_widths(config["model"]["decoder"]) if config["task"] == "segment" else ()


def architecture(config: dict) -> ModelSpec:
    """The specification of the network of `config.model` for `config.task`."""
    model = config["model"]
    auxiliary = model["auxiliary"] > 0
    return create_model(model["name"], 1, auxiliary=auxiliary, decoder=decoder_widths(config))[1]


def fits_task(config: dict, task: str) -> bool:
    """Whether the network of `config` is for `task`; one without a decoder is for all but masks."""
    return config["task"] == task or (not config["task"] and task != "segment")


def check_decoder(config: dict) -> None:
    """UserError unless `config.model.decoder` has a width for each size the maps pass through."""
    network, _ = create_model(config["model"]["name"], 1, decoder=decoder_widths(config))
    variable_shapes(network, config["model"]["image_size"])


def auxiliary_heads(config: dict) -> tuple[str, ...]:
    """Names of the auxiliary heads in use."""
    return architecture(config).auxiliary if config["model"]["auxiliary"] else ()


def new_parts(config: dict) -> tuple[str, ...]:
    """The parts that belong to the task: auxiliary heads in use, decoder, head."""
    return (*auxiliary_heads(config), *architecture(config).new_parts)


def initial_variables(
    network: nn.Module, config: dict, weights: Pretrained | None, task: Task
) -> tuple[dict, MergeReport | None]:
    """Variables before training: pretrained with a new head, or all new without `weights`.

    Raises:
      UserError: as `weights.pretrained.fill`; `keep_head` for a head that predicts something
        else than `task`.
    """
    model = config["model"]
    key, size = named_key(jax.random.key(config["seed"]), "init"), model["image_size"]
    if weights is None:
        return initialize(network, size, key), None
    if network.source_classes:
        weights = with_source_head(weights)
    spec = architecture(config)
    dont_load = [part.strip() for part in model["dont_load"].split(",") if part.strip()]
    classifiers = [f"{name}/{HEAD_OF_AUXILIARY}" for name in auxiliary_heads(config)]
    if model["keep_head"]:
        _check_head(weights, task)
        weights = rescale_heads(weights, (spec.head, *classifiers), task)
    else:
        dont_load += [f"(params|batch_stats)/{part}/.*" for part in spec.new_parts]
        dont_load += [f"params/{name}/.*" for name in classifiers]
    shapes = variable_shapes(network, size)
    filled, report = fill(shapes, for_channels(weights, network.in_chans), dont_load=dont_load)
    return _draw_kept(network, size, key, filled, report.kept), report


def _check_head(weights: Pretrained, task: Task) -> None:
    """UserError where the file says that its head predicts something else than `task`."""
    if weights.classes is None:
        return
    # Runs of the first version say no task: there was only one.
    made = "classify" if weights.task is None else _kind(weights.task)
    pairs = (made, _kind(task)), (_listed(weights.classes), _listed(task.classes))
    differ = made != _kind(task), weights.classes != task.classes
    for (theirs, ours), other in zip(pairs, differ, strict=True):
        if other:
            raise UserError(
                f"model.keep_head: the head of {weights.file.path} is for {theirs}, the data have "
                f"{ours}; set it to False for a new head"
            )


def _kind(task: Task) -> str:
    """What the outputs of a head for `task` stand for."""
    return f"ordinal ({task.ordinal})" if task.name == "ordinal" else task.name


def _listed(classes: tuple[str, ...]) -> str:
    """The first of the class names, fit for one line."""
    more = f" and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else ""
    return textwrap.shorten(", ".join(classes[:_SHOWN]), 400, placeholder=" ...") + more


def placeholder_variables(network: nn.Module, config: dict) -> dict:
    """Zeros in the places of the variables, for a checkpoint to be restored over."""
    shapes = variable_shapes(network, config["model"]["image_size"])
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _draw_kept(network, size: int, key: jax.Array, variables: dict, kept: Sequence[str]) -> dict:
    """`variables` with their first values in the places of the names `kept`, which are shapes."""
    parts = {name.split("/")[1] for name in kept}
    drawn = initialize(network, size, key, only=lambda name: name in parts)

    def pick(leaf, own):
        return own if isinstance(leaf, jax.ShapeDtypeStruct) else leaf

    return {
        kind: {
            part: jax.tree.map(pick, tree, drawn[kind][part]) if part in drawn[kind] else tree
            for part, tree in tree_of_parts.items()
        }
        for kind, tree_of_parts in variables.items()
    }


def weights_card(
    report: MergeReport | None, name: str, read: InputSpec, source: Task | None
) -> dict:
    """What the report says of the pretrained weights and of the network's input, JSON-ready.

    `source` is the task of their classifier, where it stays in the network.
    """
    return {
        "source": source.to_card() if source else None,
        "input": dataclasses.asdict(read),
        "name": name,
        "sha256": report.sha256 if report else "",
        "report": str(report or "no pretrained weights"),
    }


def describe(request: Request, dataset: Dataset, task: Task, weights: dict) -> dict:
    """The content of `environment.json`."""
    data = data_card(dataset, request.config["model"]["image_size"])
    return {
        **runs.describe_environment(),
        "command": request.command,
        "data": data,
        "data_sha256": data["sha256"],
        "task": task.to_card(),
        "weights": weights,
        "weights_sha256": weights["sha256"],
    }
