"""The .safetensors format: read after its header is checked, written with repeatable bytes.

A file is a uint64 header length, a JSON header (name -> dtype, shape, data_offsets; and
`__metadata__`, str -> str) and the tensors' little-endian values, without gaps.
"""

import hashlib
import json
import math
import pathlib

import numpy as np
import safetensors
import safetensors.numpy

from medtl_jax.errors import UserError
from medtl_jax.files import write_file
from medtl_jax.weights.checks import (
    BFLOAT16,
    RefusedError,
    check_name,
    check_shape,
    finished,
    is_plain,
    shown,
)

MAX_HEADER_BYTES = 16 * 2**20
MAX_METADATA_BYTES = 2**20

_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def read_safetensors(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns name -> array, in the header's order, and the file's metadata.

    Raises:
      RefusedError: the header is damaged, too long, names a tensor twice or describes tensors
        that are not exactly the bytes after it; an unknown dtype; NaN or infinite values.
    """
    header, start = _read_header(data)
    metadata = _checked_metadata(header.pop(_METADATA, {}))
    if not header:
        raise RefusedError("holds no tensors")
    for name, entry in header.items():
        _check_entry(name, entry)
    _check_coverage(header, len(data) - start)
    try:
        found = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        raise RefusedError(f"damaged ({' '.join(str(error).split())[:160]})") from error
    tensors = {}
    for name, entry in header.items():
        values = np.frombuffer(found.pop(name)["data"], _DTYPES[entry["dtype"]])
        tensors[name] = finished(name, values.reshape(entry["shape"]))
    return tensors, metadata


def write_safetensors(
    path: str | pathlib.Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]
) -> str:
    """Returns the SHA-256 (hex) of the .safetensors file that it writes at `path`.

    The same tensors and metadata give the same bytes in every process. Arrays are bool,
    integer, float16, float32, float64 or bfloat16 (which `read_weights` widens).

    Raises:
      UserError: what `read_weights` would refuse (no tensors, a name that cannot be shown, an
        empty array, another dtype, NaN or infinite values, metadata that is not text), or a
        file that cannot be written.
    """
    try:
        _checked_metadata(metadata)
        if not tensors:
            raise RefusedError("there are no tensors")
        for name, array in tensors.items():
            _check_writable(name, array)
    except RefusedError as refusal:
        raise UserError(f"cannot write {path}: {refusal}") from None
    arrays = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in tensors.items()}
    content = _repeatable(safetensors.numpy.save(arrays), metadata)
    write_file(pathlib.Path(path), content)
    return hashlib.sha256(content).hexdigest()


def _read_header(data: bytes) -> tuple[dict, int]:
    """The header, and where it ends."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise RefusedError(f"its header claims {length:,} bytes, more than {MAX_HEADER_BYTES:,}")
    start = _LENGTH_BYTES + length
    if start > len(data):
        raise RefusedError("truncated inside its header: copy or download it again")
    try:
        text = data[_LENGTH_BYTES:start].decode("utf-8")
        header = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"its header is damaged ({str(error)[:100]})") from error
    if type(header) is not dict:
        raise RefusedError("its header is not a JSON object")
    return header, start


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in result if names.count(name) > 1)
        raise RefusedError(f"the name {shown(twice)} appears twice")
    return result


def _no_constant(text: str) -> None:
    raise RefusedError(f"its header holds {text}, which is not JSON")


def _checked_metadata(metadata) -> dict[str, str]:
    texts = type(metadata) is dict and all(
        type(text) is str for item in metadata.items() for text in item
    )
    if not texts:
        raise RefusedError("its metadata is not a table of texts")
    if sum(len(key) + len(value) for key, value in metadata.items()) > MAX_METADATA_BYTES:
        raise RefusedError(f"its metadata has more than {MAX_METADATA_BYTES:,} characters")
    return metadata


def _check_entry(name: str, entry) -> None:
    check_name(name)
    where = f"tensor {shown(name)}"
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise RefusedError(f"{where} lacks a dtype, shape or data_offsets, or has more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in _DTYPES:
        raise RefusedError(f"{where} has dtype {shown(str(dtype))}; known: {' '.join(_DTYPES)}")
    lists = type(shape) is type(offsets) is list and len(offsets) == 2
    if not lists or any(type(n) is not int or not 0 <= n < 2**62 for n in (*shape, *offsets)):
        raise RefusedError(f"{where} has an invalid shape or data_offsets")
    check_shape(name, tuple(shape))
    claim = math.prod(shape) * _DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != claim:
        has = f"{offsets[1] - offsets[0]:,} bytes"
        raise RefusedError(f"{where} has {has}, its shape and dtype take {claim:,}")


def _check_coverage(header: dict, size: int) -> None:
    """Refuses offsets that overlap, leave a gap or do not end at `size`."""
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        if start != position:
            kind = "overlaps the one before it" if start < position else "leaves a gap before it"
            raise RefusedError(f"tensor {shown(name)} {kind}")
        if end > size:
            raise RefusedError(f"tensor {shown(name)} ends {end - size:,} bytes after the file")
        position = end
    if position != size:
        raise RefusedError(f"{size - position:,} bytes too many at its end")


def _check_writable(name: str, array: np.ndarray) -> None:
    check_name(name)
    if name == _METADATA:
        raise RefusedError(f"{_METADATA} cannot be a tensor's name")
    if array.dtype != BFLOAT16 and not is_plain(array.dtype):
        raise RefusedError(f"tensor {shown(name)} has dtype {array.dtype}, no plain number")
    check_shape(name, array.shape)
    finished(name, array)


def _repeatable(content: bytes, metadata: dict[str, str]) -> bytes:
    """`content` with `metadata` put into its header, sorted.

    The library itself writes metadata in an order that changes from process to process.
    """
    header, start = _read_header(content)
    if metadata:
        header = {_METADATA: dict(sorted(metadata.items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text + content[start:]
