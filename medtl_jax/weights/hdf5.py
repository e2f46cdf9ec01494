"""Keras' .h5 weights -> flat arrays, read in a process of its own with bounded resources.

Read are legacy files (lists `layer_names` and `weight_names`), whole models in that form (group
`model_weights`), and Keras 3's `.weights.h5`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import numpy as np

from medtl_jax.weights import hdf5_child
from medtl_jax.weights.checks import RefusedError, check_name, shown, unpacked_limit
from medtl_jax.weights.safetensors_files import MAX_HEADER_BYTES, read_safetensors

# Damage can make HDF5 loop for ever; a large file may take longer.
MAX_SECONDS = 30
BYTES_PER_SECOND = 8 * 2**20

_MAX_REASON_BYTES = 300
_KERNEL_AXES = (2, 4, 5)
_BATCH_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
_LEGACY_KINDS = {
    "W": "kernel",
    "b": "bias",
    "gamma": "gamma",
    "beta": "beta",
    "running_mean": "moving_mean",
    # Keras 1 called it so, but kept the variance there.
    "running_std": "moving_variance",
}


def read_hdf5(data: bytes) -> dict[str, np.ndarray]:
    """Returns "layer/weight" -> array of the Keras weight file with the content `data`.

    For the names see `keras_name` and `keras3_names`. The optimizer's state beside the weights
    is left out.

    Raises:
      RefusedError: damaged; links, storages, filters or dtypes that Keras does not write; NaN
        or infinite values; the reading process crashed or used too much time or memory.
    """
    found, metadata = read_safetensors(_run(data))
    pairs = json.loads(metadata["names"])
    arrays = [found[str(number)] for number in range(len(pairs))]
    if all(path.startswith(f"{layer}/") for layer, path in pairs):
        names = [keras_name(layer, path) for layer, path in pairs]
    else:
        names = keras3_names(pairs, [array.ndim for array in arrays])
    tensors = {}
    for name, array in zip(names, arrays, strict=True):
        check_name(name)
        if name in tensors:
            raise RefusedError(f"the name {shown(name)} appears twice")
        tensors[name] = array
    return tensors


def keras_name(layer: str, path: str) -> str:
    """Returns "layer/weight" with the spellings of Keras 1, 2 and 3 made one.

    >>> keras_name("block1_conv1", "block1_conv1/block1_conv1/kernel:0")
    'block1_conv1/kernel'
    >>> keras_name("fire2/squeeze1x1", "fire2/squeeze1x1/fire2/squeeze1x1_W_1:0")
    'fire2/squeeze1x1/kernel'
    """
    # Keras 3 puts the model's name before the layer's: "c1/sequential/c1/kernel".
    weight = f"/{path.removesuffix(':0')}".rpartition(f"/{layer}/")[2]
    own = f"/{path.removesuffix(':0')}".removeprefix(f"/{layer}/")
    legacy = re.fullmatch(rf"{re.escape(layer)}_({'|'.join(_LEGACY_KINDS)})(_\d+)?", own)
    return f"{layer}/{_LEGACY_KINDS[legacy[1]] if legacy else weight}"


def keras3_names(pairs: Sequence[tuple[str, str]], axes: Sequence[int]) -> list[str]:
    """Returns "layer/weight" for the (layer, path) `pairs` of a `.weights.h5`.

    Keras 3 numbers a layer's weights. What they are follows from their numbers of `axes`: one
    of 2, 4 or 5 axes, alone or with a vector, is a kernel and its bias; four vectors are a
    batch normalisation; all others keep their number. Where a group has no layer name or two
    groups have the same, all names are the paths in the file.

    >>> keras3_names([("c1", "layers/conv2d/vars/0"), ("c1", "layers/conv2d/vars/1")], [4, 1])
    ['c1/kernel', 'c1/bias']
    """
    groups: dict[str, dict[str, int]] = {}
    for (_, path), count in zip(pairs, axes, strict=True):
        folder, _, number = path.rpartition("/")
        groups.setdefault(folder, {})[number] = count
    titles = {path.rpartition("/")[0]: layer for layer, path in pairs}
    if not all(titles.values()) or len(set(titles.values())) < len(titles):
        return [path for _, path in pairs]
    names = []
    for layer, path in pairs:
        folder, _, number = path.rpartition("/")
        names.append(f"{layer}/{_kinds(groups[folder]).get(number, number)}")
    return names


def _kinds(axes: dict[str, int]) -> dict[str, str]:
    """Number of a weight in its layer -> what it is, where the axes of all of them tell."""
    numbers = [str(number) for number in range(len(axes))]
    if axes.keys() != set(numbers):
        return {}
    first, *rest = (axes[number] for number in numbers)
    if first in _KERNEL_AXES and rest in ([], [1]):
        return dict(zip(numbers, ("kernel", "bias"), strict=False))
    if [first, *rest] == [1, 1, 1, 1]:
        return dict(zip(numbers, _BATCH_NORM, strict=True))
    return {}


def _run(data: bytes) -> bytes:
    """What the reading process wrote, a .safetensors file."""
    limit = unpacked_limit(len(data))
    seconds = MAX_SECONDS + len(data) // BYTES_PER_SECOND
    # The file twice (as read, and HDF5's copy), the tensors twice (as read, and as written).
    numbers = limit, 2 * (len(data) + limit), seconds
    # -P: no module of the folder that the program lies in.
    command = [sys.executable, "-P", hdf5_child.__file__, *map(str, numbers)]
    # "::" keeps HDF5 from loading plugins.
    bounded = {"HDF5_PLUGIN_PRELOAD": "::", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as result:
        try:
            done = subprocess.run(
                command,
                input=data,
                stdout=result,
                stderr=subprocess.DEVNULL,
                timeout=seconds,
                env={**os.environ, **bounded},
            )
        except subprocess.TimeoutExpired:
            raise RefusedError(f"damaged (HDF5 did not finish within {seconds} s)") from None
        result.seek(0)
        if done.returncode == hdf5_child.REFUSED:
            reason = result.read(_MAX_REASON_BYTES).decode("utf-8", "replace")
            raise RefusedError("".join(c if c.isprintable() else " " for c in reason))
        if done.returncode:
            raise RefusedError(f"damaged (the process that reads it ended with {done.returncode})")
        return result.read(limit + MAX_HEADER_BYTES)
