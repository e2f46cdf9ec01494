"""Pretrained weights, from the words of `model.weights` to a model's variables."""

import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from medtl_jax.errors import UserError
from medtl_jax.models.backbone import FEATURES
from medtl_jax.models.inputs import CONTRASTS, InputSpec
from medtl_jax.models.registry import ModelSpec
from medtl_jax.models.unet import DECODER
from medtl_jax.objectives.task import Task
from medtl_jax.weights import hub, tables
from medtl_jax.weights.adapt import adapt_kernel, adapted_input
from medtl_jax.weights.checks import shown
from medtl_jax.weights.files import WeightFile, read_weights
from medtl_jax.weights.merge import MergeReport, merge_weights
from medtl_jax.weights.naming import choose_naming, to_linen
from medtl_jax.weights.safetensors_files import write_safetensors

OWN = "medtl_jax"

_MOST_CLASSES, _LONGEST_CLASS = 100_000, 1000


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The weights of a file for a model, under the model's own names.

    Attributes:
      flat: `"params/stem/conv/kernel"` -> array in Linen's layout.
      input: what they expect of an image.
      spec: of the model that they are for.
      file: where they were read from; its tensors are left out.
      scheme: whose names the file uses.
      classes: what its classifier tells apart; None where the file does not say.
      task: what its outputs stand for; None where the file does not say.
      adapted: what `for_channels` and `rescale_heads` changed, in words.
      input_origin: who says what `input` is, for the report.
    """

    flat: dict[str, np.ndarray]
    input: InputSpec
    spec: ModelSpec
    file: WeightFile
    scheme: str
    classes: tuple[str, ...] | None = None
    task: Task | None = None
    adapted: tuple[str, ...] = ()
    input_origin: str = ""


def open_pretrained(spec: ModelSpec, path: pathlib.Path) -> Pretrained:
    """The weights in the file `path`, named as in the model `spec`.

    Raises:
      UserError: as `read_weights`, `choose_naming`, `to_linen` and `hub.read_input`, with the
        path in front; a file of ours for another model, or with a damaged description of its
        input, its classes or its task.
    """
    file, classes, task = read_weights(path), None, None
    try:
        if file.metadata.get("format") == OWN:
            flat, input_spec, scheme = file.tensors, _own_input(spec, file.metadata), OWN
            classes, origin = _own_classes(file.metadata), "as the file says"
            task = _own_task(file.metadata, classes)
        else:
            said = _hub_input(spec, path)
            naming = choose_naming(spec.name, tables.namings(spec.name), list(file.tensors))
            flat, input_spec = to_linen(naming, file.tensors), said or naming.input
            scheme, origin = naming.scheme, f"names of {naming.scheme}"
            if said is not None:
                origin = "as its repository says"
    except UserError as error:
        raise UserError(f"weights file {path}: {error}") from error
    file = dataclasses.replace(file, tensors={})
    return Pretrained(flat, input_spec, spec, file, scheme, classes, task, input_origin=origin)


def for_channels(weights: Pretrained, channels: int) -> Pretrained:
    """`weights` for images of `channels` channels, see `weights.adapt`.

    Raises:
      UserError: as `adapted_input`; a file without a first convolution over the channels that it
        is said to read, or whose offset does not belong to it.
    """
    target = adapted_input(weights.input, channels)
    if target == weights.input:
        return weights
    name = f"params/{weights.spec.first_conv}"
    kernel = weights.flat.get(f"{name}/kernel")
    valid = kernel is not None and kernel.ndim == 4 and kernel.dtype.kind == "f"
    if not valid or kernel.shape[2] != weights.input.channels:
        raise UserError(
            f"weights file {weights.file.path}: no first convolution {name}/kernel over "
            f"{weights.input.channels} channels to adapt to {channels}"
        )
    offset = weights.flat.get(f"{name}/offset")
    wanted = (*kernel.shape[:2], 1, kernel.shape[3]) if weights.input.offset else None
    if (None if offset is None else offset.shape) != wanted:
        raise UserError(
            f"weights file {weights.file.path}: {name}/offset does not belong to its kernel and to "
            "the input that the file describes"
        )
    parts = adapt_kernel(kernel, offset, weights.input, target)
    flat = {**weights.flat, **{f"{name}/{part}": array for part, array in parts.items()}}
    new = target.offset and not weights.input.offset
    means = ", the means' difference in its offset" if new else ""
    words = f"{name}/kernel from {weights.input.channels} to {channels} channels{means}"
    adapted = (*weights.adapted, words)
    return dataclasses.replace(weights, flat=flat, input=target, adapted=adapted)


def rescale_heads(weights: Pretrained, heads: Sequence[str], task: Task) -> Pretrained:
    """`weights` of a regression with `heads` whose outputs are in the scales of `task`.

    A head gives numbers z in standard deviations s about the mean m of the targets that it was
    trained on. As z s + m = z' s' + m', its kernel and bias are multiplied by s / s', and
    (m - m') / s' is added to the bias. Weights of another task, and tensors of another shape,
    stay as they are.
    """
    made = weights.task
    if made is None or made.name != "regress" or (made.mean, made.std) == (task.mean, task.std):
        return weights
    mean, std = np.subtract(made.mean, task.mean), np.asarray(task.std)
    ratio, flat = made.std / std, dict(weights.flat)
    for name in heads:
        for part, shift in (("kernel", 0.0), ("bias", mean / std)):
            array = flat.get(f"params/{name}/{part}")
            if array is not None and array.shape[-1:] == ratio.shape:
                flat[f"params/{name}/{part}"] = (array * ratio + shift).astype(array.dtype)
    words = f"{', '.join(heads)} from the scale of the file's targets to that of the data's"
    return dataclasses.replace(weights, flat=flat, adapted=(*weights.adapted, words))


def fill(
    variables, weights: Pretrained, *, dont_load: Sequence[str] = ()
) -> tuple[dict, MergeReport]:
    """Return `variables` with `weights` in them, and a report; see `merge_weights`.

    Auxiliary heads and U-Net decoders that only the file or only the model has are left out of the
    comparison, and so are the layers before the classifier that a U-Net does without; the report
    says so. The offset of a first convolution goes with its kernel: where `dont_load`
    excuses the one, the other keeps the model's own too.

    Raises:
      UserError: as `merge_weights`, with the file's path in front.
    """
    spec, file = weights.spec, weights.file
    optional = (*spec.auxiliary, *spec.optional, DECODER)
    if DECODER in variables["params"]:
        optional = (*optional, FEATURES)
    merge = functools.partial(merge_weights, variables, weights.flat, optional=optional)
    kernel, offset = (f"params/{spec.first_conv}/{part}" for part in ("kernel", "offset"))
    try:
        merged, report = merge(dont_load=dont_load)
        if kernel in report.kept and offset in report.loaded:
            merged, report = merge(dont_load=(*dont_load, re.escape(offset)))
    except UserError as error:
        raise UserError(f"weights file {file.path}: {error}") from error
    report = dataclasses.replace(
        report,
        source=file.path.name,
        sha256=file.sha256,
        scheme=weights.scheme,
        input=weights.input,
        input_origin=weights.input_origin,
        adapted=weights.adapted,
    )
    return merged, report


def save_weights(path: pathlib.Path, variables, spec: ModelSpec, task: Task) -> str:
    """Writes a model's variables as a file that `model.weights` takes; returns its SHA-256.

    The file is .safetensors with the names that the model uses. Its metadata hold the model's
    name, the task and the classes of the head and what the weights expect of an image.
    """
    flat = {
        f"{kind}/{name}": np.asarray(leaf)
        for kind, tree in variables.items()
        for name, leaf in _leaves(tree)
    }
    metadata = {
        "format": OWN,
        "model": spec.name,
        "input": json.dumps(dataclasses.asdict(spec.input)),
        "classes": json.dumps(list(task.classes)),
        "task": json.dumps(task.to_card()),
    }
    return write_safetensors(path, flat, metadata)


def _leaves(tree, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _hub_input(spec: ModelSpec, path: pathlib.Path) -> InputSpec | None:
    """What the hub says that the weights at `path` expect; None for a file from elsewhere."""
    config = hub.config_path(path)
    if not config.exists():
        return None
    said = hub.read_input(config, spec.name, tables.timm_architecture(spec.name))
    if said.channels != spec.input.channels:
        raise UserError(
            f"its repository's config.json has pretrained_cfg.mean for {said.channels} channels, "
            f"the weights of {spec.name} read {spec.input.channels}; choose other weights"
        )
    return said


def _own_input(spec: ModelSpec, metadata: dict[str, str]) -> InputSpec:
    made = metadata.get("model", "")
    if made != spec.name:
        raise UserError(f"made for the model {shown(made)}, not for {spec.name}")
    try:
        return parse_input(json.loads(metadata["input"]))
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"its metadata describe no valid input ({error})") from None


def _own_classes(metadata: dict[str, str]) -> tuple[str, ...]:
    try:
        classes = json.loads(metadata["classes"])
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"its metadata name no valid classes ({error})") from None
    valid = isinstance(classes, list) and 1 <= len(classes) <= _MOST_CLASSES
    if not valid or not all(type(name) is str and len(name) <= _LONGEST_CLASS for name in classes):
        raise UserError(
            f"its metadata must name 1 to {_MOST_CLASSES:,} classes of up to {_LONGEST_CLASS} "
            "characters"
        )
    return tuple(classes)


def _own_task(metadata: dict[str, str], classes: tuple[str, ...]) -> Task | None:
    if "task" not in metadata:
        return None
    try:
        task = Task.from_card(json.loads(metadata["task"]))
    except (ValueError, RecursionError):
        raise UserError("its metadata describe no valid task") from None
    if task.classes != classes:
        raise UserError("its metadata name other classes than those of its task")
    return task


def parse_input(content) -> InputSpec:
    """The `InputSpec` that `dataclasses.asdict` had turned into JSON. ValueError if it is none.

    Earlier versions wrote no `contrast`: they had none.
    """
    keys = {"mean", "std", "offset"}
    if not isinstance(content, dict) or content.keys() - {"contrast"} != keys:
        raise ValueError("not a section of mean, std, offset and contrast")
    mean, std, offset = content["mean"], content["std"], content["offset"]
    contrast = content.get("contrast", "none")
    if type(contrast) is not str or contrast not in CONTRASTS:
        raise ValueError(f"contrast must be one of {', '.join(CONTRASTS)}")

    def numbers(values):
        return isinstance(values, list) and all(
            type(value) is float and math.isfinite(value) for value in values
        )

    valid = numbers(mean) and numbers(std) and 1 <= len(mean) == len(std) <= 1024
    if not (valid and min(std) > 0 and type(offset) is bool):
        raise ValueError("mean and std must be lists of as many numbers, std above 0")
    return InputSpec(tuple(mean), tuple(std), offset, contrast)
