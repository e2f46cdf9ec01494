"""Torch's results on drawn weights, for tests of the model families and of their layers.

The weights and images are pure functions of a seed, so only names, shapes and results are stored
(`tests/golden`, made by `make_references.py` there, which draws by this module as well: it
imports numpy alone).
"""

import dataclasses
import json
import math
import pathlib
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
ARCHITECTURES = (
    "alexnet",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
    "vgg11_bn",
    "vgg13_bn",
    "vgg16_bn",
    "vgg19_bn",
    "googlenet",
    "inception_v3",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "densenet121",
    "mobilenet_v2",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "tf_efficientnet_lite1",
    "tf_efficientnet_lite2",
)
# Not torchvision's or timm's, and therefore tested apart: GoogLeNet as Caffe has it.
CAFFE_ARCHITECTURE = "googlenet_caffe"
# One a family: those for which the gradient at an image is stored.
GRADIENT_ARCHITECTURES = (
    "alexnet",
    "vgg11",
    "vgg16_bn",
    "googlenet",
    "inception_v3",
    "resnet18",
    "resnet50",
    "densenet121",
    "mobilenet_v2",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    CAFFE_ARCHITECTURE,
)
# Kernels in front of a local response normalisation, which leaves responses of order 1 alone.
AMPLIFIED = {"conv1/7x7_s2/w": 30.0, "conv2/3x3/w": 30.0}


@dataclasses.dataclass(frozen=True)
class Reference:
    """What torch says about one architecture; tests/golden/README.md lists the values.

    Attributes:
      name: torchvision's or timm's name of the architecture, or `CAFFE_ARCHITECTURE`.
      shapes: key -> shape of torch's state dict, in its order.
      num_parameters: trainable values, without running statistics.
      sizes: the two sides of the square images, the smaller (even) one first.
      gradient_at: size and index of the drawn image whose gradient is stored, or nothing for
        an architecture outside `GRADIENT_ARCHITECTURES`.
      values: name -> float32 array.
      float32_errors: name -> relative error of torch's own float32, one digit: far below 1e-4
        in eval mode, more where batch statistics of few values magnify every rounding.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    num_parameters: int
    sizes: tuple[int, int]
    gradient_at: tuple[int, ...]
    values: dict[str, np.ndarray]
    float32_errors: dict[str, float]


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """One layer on one small input, images as [b, h, w, c] and kernels as [h, w, in, out].

    Attributes:
      name: unique, fit for the id of a test.
      operation: torch's name of the layer.
      settings: torch's arguments.
      arrays: float32 inputs, outputs, and gradients (`gradient_<input>`) of
        sum(output * cotangent).
    """

    name: str
    operation: str
    settings: dict
    arrays: dict[str, np.ndarray]


def load_reference(name: str) -> Reference:
    """Return the stored results of architecture `name`: of `ARCHITECTURES`, or Caffe's."""
    description, values = _read(name)
    return Reference(
        name=name,
        shapes={key: tuple(shape) for key, shape in description["shapes"].items()},
        num_parameters=description["num_parameters"],
        sizes=tuple(description["sizes"]),
        gradient_at=tuple(description["gradient_at"]),
        values=values,
        float32_errors=description["float32_errors"],
    )


def load_layers(operation: str | None = None) -> list[LayerCase]:
    """Return the stored layers, or those of one operation."""
    description, values = _read("layers")
    # Each array of its own in the file would cost more bytes than its values.
    flat, cases = values["flat"], []
    for name, case in description.items():
        arrays = {}
        for key, shape in case["shapes"].items():
            count = math.prod(shape)
            arrays[key], flat = flat[:count].reshape(shape), flat[count:]
        if operation in (None, case["operation"]):
            cases.append(LayerCase(name, case["operation"], case["settings"], arrays))
    return cases


def write(name: str, description: dict, values: Mapping[str, np.ndarray]) -> pathlib.Path:
    """Write what `load_reference` and `load_layers` read; return the path."""
    path = GOLDEN / f"{name}.npz"
    text = json.dumps(description, separators=(",", ":")).encode()
    np.savez_compressed(path, description=np.frombuffer(text, np.uint8), **values)
    return path


def _read(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    with np.load(GOLDEN / f"{name}.npz") as stored:
        values = {key: stored[key] for key in stored.files}
    return json.loads(values.pop("description").tobytes()), values


def drawn_tensor(key: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return the tensor of `key` in torch's layout: float32, or int64 0 for a batch counter.

    Kernels are normal with the variance 2 / fan-in, biases and running means normal with the
    deviation 0.1, scales and running variances uniform in [0.5, 1.5). Caffe's `/w` are kernels
    and its `/b` biases; those in `AMPLIFIED` are multiplied by the factor there.
    """
    rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
    leaf = key.replace("/", ".").rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.asarray(0, np.int64)
    if leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    values = rng.standard_normal(shape)
    # In place: the largest tensor of the VGGs takes 0.8 GB in float64.
    centred = leaf in ("running_mean", "bias", "b")
    values *= 0.1 if centred else np.sqrt(2.0 / np.prod(shape[1:])) * AMPLIFIED.get(key, 1.0)
    return values.astype(np.float32)


def drawn_input(size: int, batch: int = 2, seed: int = 0) -> np.ndarray:
    """Return normal float32 images [batch, size, size, 3]; a smaller batch is a prefix."""
    rng = np.random.default_rng([seed, size])
    images = rng.standard_normal((batch, 3, size, size)).astype(np.float32)
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def gradient_input(reference: Reference) -> np.ndarray:
    """Return the image [1, s, s, 3] at which d(sum of logits)/d(image) is stored."""
    size, index = reference.gradient_at
    return drawn_input(size, index + 1)[index:]


class _DrawnState(Mapping):
    """A state dict that draws a tensor whenever it is asked for it, and keeps none."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int):
        self._shapes = shapes
        self._seed = seed

    def __getitem__(self, key: str) -> np.ndarray:
        return drawn_tensor(key, self._shapes[key], self._seed)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def state_dict(reference: Reference, seed: int = 0) -> Mapping[str, np.ndarray]:
    """Return torch's state dict of `reference`; each tensor is drawn when it is read."""
    return _DrawnState(reference.shapes, seed)


def relative_error(found, wanted) -> float:
    """Return ||found - wanted|| / ||wanted||, in float64; the shapes must be equal.

    Deep networks reach large values on drawn weights, so a difference of values says little.
    """
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if found.shape != wanted.shape:
        raise AssertionError(f"found {found.shape}, wanted {wanted.shape}")
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
