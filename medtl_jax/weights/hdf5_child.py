"""The process that reads a Keras .h5 file: HDF5's C library is not safe on hostile input.

Run by `medtl_jax.weights.hdf5` as a program of its own, and importing nothing of this package:

    python -P hdf5_child.py TENSOR_BYTES MEMORY_BYTES SECONDS < FILE > RESULT

It exits with 0 and writes a .safetensors file whose tensors are called "0", "1", ... and whose
metadata `names` is the JSON list of their [layer, path in the file]; or it exits with `REFUSED`
and writes why, on one line. Anything else is a crash.
"""

import json
import math
import sys

import h5py
import numpy as np
from safetensors.numpy import save

REFUSED = 3
MAX_OBJECTS = 100_000
MAX_DEPTH = 32
# For the interpreter, numpy and HDF5 themselves.
OVERHEAD_BYTES = 2**30

_FILTERS = {
    h5py.h5z.FILTER_DEFLATE,
    h5py.h5z.FILTER_SHUFFLE,
    h5py.h5z.FILTER_FLETCHER32,
    h5py.h5z.FILTER_LZF,
}
_LAYOUTS = {h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED}
_KINDS = {"f": (2, 4, 8), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "b": (1,)}
# What belongs to the optimizer and not to the model, in a Keras 3 file.
_OPTIMIZER = "optimizer"
_MODEL = "model_weights"
_TOP_LEVEL = "top_level_model_weights"


class RefusedError(Exception):
    """Why the file is refused."""


def read_arrays(data: bytes, limit: int) -> tuple[list[tuple[str, str]], list[np.ndarray]]:
    """Returns the (layer, path) names and the arrays of the HDF5 file `data`.

    In a file with lists of names, the path is "layer/weight" and the order that of the lists.
    In a Keras 3 file the layer is the attribute `name` of the group that holds the dataset,
    "" where there is none.

    Args:
      data: the whole file.
      limit: bytes that the arrays may take.

    Raises:
      RefusedError: an object, a link or a storage that Keras does not write, arrays that
        exceed `limit`, or lists of names that do not fit the arrays.
    """
    with h5py.File(h5py.h5f.open_file_image(data), "r") as file:
        root = file
        # A whole model: its configuration and its optimizer's state lie beside this group.
        if _MODEL in file and not _has_names(file, "layer_names"):
            root = _member(file, _MODEL)
        groups, datasets = _walk(root)
        if _has_names(root, "layer_names"):
            names = _listed_names(root, groups)
        else:
            names = [(_title(groups, path), path) for path in datasets]
        paths = [path for _, path in names]
        if sorted(paths) != sorted(datasets):
            culprit = min(set(paths) ^ datasets.keys(), default="a name")
            raise RefusedError(f"its lists of names do not fit its tensors ({culprit!r})")
        left = limit
        for path, dataset in datasets.items():
            left -= _checked_size(path, dataset, limit)
            if left < 0:
                raise RefusedError(f"its tensors would take more than {limit:,} bytes")
        return names, [_native(datasets[path][()]) for path in paths]


def _member(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
    """The object `name` of `group`, where the link to it is an ordinary one."""
    if not isinstance(group, h5py.Group):
        raise RefusedError(f"{group.name!r} is not a group")
    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise RefusedError(f"{name!r} is a {type(link).__name__}: links are not followed")
    return group[name]


def _walk(root: h5py.Group) -> tuple[dict[str, h5py.Group], dict[str, h5py.Dataset]]:
    """The groups and datasets below `root` by their path; each group is entered once."""
    groups, datasets = {"": root}, {}
    seen, queue = set(), [("", root)]
    while queue:
        prefix, group = queue.pop()
        address = h5py.h5o.get_info(group.id).addr
        if address in seen or prefix.count("/") > MAX_DEPTH:
            raise RefusedError("groups that hold each other, or are nested too deep")
        seen.add(address)
        for name in group:
            path = prefix + name
            member = _member(group, name)
            if isinstance(member, h5py.Dataset):
                datasets[path] = member
            elif not isinstance(member, h5py.Group):
                raise RefusedError(f"{path!r} is neither a group nor a dataset")
            elif path != _OPTIMIZER:
                groups[path] = member
                queue.append((f"{path}/", member))
            if len(groups) + len(datasets) > MAX_OBJECTS:
                raise RefusedError(f"more than {MAX_OBJECTS:,} groups and datasets")
    return groups, datasets


def _listed_names(root: h5py.Group, groups: dict[str, h5py.Group]) -> list[tuple[str, str]]:
    layers = _texts(root, "layer_names")
    if _TOP_LEVEL in groups and _has_names(groups[_TOP_LEVEL], "weight_names"):
        layers.append(_TOP_LEVEL)
    names = []
    for layer in layers:
        if layer not in groups:
            raise RefusedError(f"the layer {layer!r} is listed but not there")
        names += [(layer, f"{layer}/{name}") for name in _texts(groups[layer], "weight_names")]
    return names


def _title(groups: dict[str, h5py.Group], path: str) -> str:
    """What Keras 3 notes as the layer's own name (the group is called by the layer's class)."""
    group = groups[path.rpartition("/")[0]]
    if "name" not in group.attrs:
        return ""
    texts = _attribute(group, "name")
    return texts[0] if len(texts) == 1 else ""


def _has_names(group: h5py.Group, name: str) -> bool:
    return name in group.attrs or f"{name}0" in group.attrs


def _texts(group: h5py.Group, name: str) -> list[str]:
    """The attribute's texts; Keras cuts a list of more than 64 KB into `<name>0`, `<name>1`, ..."""
    if name in group.attrs:
        return _attribute(group, name)
    texts, part = [], 0
    while f"{name}{part}" in group.attrs:
        texts += _attribute(group, f"{name}{part}")
        part += 1
    return texts


def _attribute(group: h5py.Group, name: str) -> list[str]:
    attribute = group.attrs.get_id(name)
    count, dtype = math.prod(attribute.shape), attribute.dtype
    if count == 0:
        return []
    if count > MAX_OBJECTS or count * dtype.itemsize > 2**26 or len(attribute.shape) > 1:
        raise RefusedError(f"the attribute {name!r} is not a list of names")
    if dtype.kind != "S" and h5py.check_string_dtype(dtype) is None:
        raise RefusedError(f"the attribute {name!r} is not a list of names")
    values = np.atleast_1d(group.attrs[name]).tolist()
    return [value.decode("utf-8") if isinstance(value, bytes) else value for value in values]


def _checked_size(path: str, dataset: h5py.Dataset, limit: int) -> int:
    """The dataset's bytes, after every check that can be made without reading it."""
    create, dtype, shape = dataset.id.get_create_plist(), dataset.dtype, dataset.shape
    if dtype.subdtype is not None or dtype.itemsize not in _KINDS.get(dtype.kind, ()):
        raise RefusedError(f"the tensor {path!r} has dtype {dtype}, no plain number")
    if shape is None or 0 in shape:
        raise RefusedError(f"the tensor {path!r} is empty")
    if create.get_layout() not in _LAYOUTS or create.get_external_count():
        raise RefusedError(f"the tensor {path!r} is virtual or stored in another file")
    filters = {create.get_filter(index)[0] for index in range(create.get_nfilters())}
    if filters - _FILTERS:
        raise RefusedError(f"the tensor {path!r} needs the HDF5 filter {min(filters - _FILTERS)}")
    size = math.prod(shape) * dtype.itemsize
    stored = dataset.id.get_storage_size()
    if create.get_layout() == h5py.h5d.CHUNKED:
        if math.prod(create.get_chunk()) * dtype.itemsize > limit or not stored:
            raise RefusedError(f"the tensor {path!r} has chunks that are too large, or none")
    elif stored != size:
        raise RefusedError(f"the tensor {path!r} claims {size:,} bytes, {stored:,} are there")
    return size


def _native(value) -> np.ndarray:
    array = np.asarray(value)
    return array.astype(array.dtype.newbyteorder("="), order="C", copy=False)


def _limit_resources(memory: int, seconds: int) -> None:
    """Bounds memory, processor time and output, where the platform can."""
    try:
        import resource
    except ImportError:
        return
    wanted = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: memory,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (bound, bound))


def main(tensor_bytes: int, memory_bytes: int, seconds: int) -> int:
    """Reads standard input and writes standard output; returns the exit code."""
    _limit_resources(memory_bytes + OVERHEAD_BYTES, seconds)
    try:
        names, arrays = read_arrays(sys.stdin.buffer.read(), tensor_bytes)
        numbered = {str(number): array for number, array in enumerate(arrays)}
        result, code = save(numbered, {"names": json.dumps(names)}), 0
    except RefusedError as refusal:
        result, code = str(refusal).encode(errors="replace"), REFUSED
    # HDF5 reports damage as almost any type (OSError, RuntimeError, KeyError, ValueError, ...).
    except Exception as error:
        result, code = (
            f"damaged ({type(error).__name__}: {error})".encode(errors="replace"),
            REFUSED,
        )
    sys.stdout.buffer.write(result)
    sys.stdout.buffer.flush()
    return code


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
