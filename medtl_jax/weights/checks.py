"""What the readers of all weight formats share: the refusal, the limits, names and values."""

import ml_dtypes
import numpy as np

MAX_NAME_LENGTH = 256
MAX_AXES = 8
# Tensors may share a storage (tied weights); a file may not ask for much more than it holds.
MAX_EXPANSION = 4
# A compressed file may unpack to this many times its size, within these bounds.
MAX_INFLATION = 32
MIN_UNPACKED_BYTES = 16 * 2**20
MAX_UNPACKED_BYTES = 8 * 2**30

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_KINDS = {"f": (2, 4, 8), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "b": (1,)}


class RefusedError(Exception):
    """Why a file is refused; `read_weights` puts the path in front."""


def shown(text: str) -> str:
    """Returns `text` quoted, escaped and cut, fit for one line on a terminal."""
    return repr(text if len(text) <= 100 else f"{text[:100]}...")


def check_name(name: str) -> None:
    """Raises RefusedError unless `name` is one that can be shown, and is not very long."""
    if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        raise RefusedError(f"the tensor name {shown(name)} is not a short printable one")


def check_total(asked: int, limit: int, size: int) -> None:
    """Raises RefusedError where tensors of `asked` bytes exceed `limit`; `size` is the file's."""
    if asked > limit:
        raise RefusedError(f"its tensors would take {asked:,} bytes, the file has {size:,}")


def unpacked_limit(size: int) -> int:
    """Returns how many bytes the tensors of a compressed file of `size` bytes may take."""
    return min(max(MIN_UNPACKED_BYTES, MAX_INFLATION * size), MAX_UNPACKED_BYTES)


def is_plain(dtype: np.dtype) -> bool:
    """Whether `dtype` is a bool, integer or float (2, 4 or 8 bytes) of numpy's own."""
    return dtype.subdtype is None and dtype.itemsize in _KINDS.get(dtype.kind, ())


def check_shape(name: str, shape: tuple[int, ...]) -> None:
    """Raises RefusedError for more than `MAX_AXES` axes or an axis without a value."""
    if len(shape) > MAX_AXES:
        raise RefusedError(f"tensor {shown(name)} has {len(shape):,} axes, more than {MAX_AXES}")
    if any(size < 1 for size in shape):
        raise RefusedError(f"tensor {shown(name)} is empty")


def finished(name: str, array: np.ndarray) -> np.ndarray:
    """Returns a copy of `array`: native, C-contiguous, bfloat16 widened to float32.

    Raises:
      RefusedError: a value is NaN or infinite, or a bool is neither 0 nor 1.
    """
    dtype = np.dtype(np.float32) if array.dtype == BFLOAT16 else array.dtype.newbyteorder("=")
    if dtype == np.bool_ and array.view(np.uint8).max(initial=0) > 1:
        raise RefusedError(f"tensor {shown(name)} has a bool that is neither 0 nor 1")
    # Widening a signalling NaN warns; the line below refuses it.
    with np.errstate(invalid="ignore"):
        result = array.astype(dtype, order="C", copy=True)
    if dtype.kind == "f" and not np.isfinite(result).all():
        raise RefusedError(f"tensor {shown(name)} has NaN or infinite values")
    return result
