"""Weight files from outside, read without executing anything in them.

A weight file is hostile: every size is checked against the bytes that are there before anything
is allocated, and what is not known is refused.
"""

import dataclasses
import hashlib
import io
import pathlib

import numpy as np

from medtl_jax.archives import ArchiveError, open_archive
from medtl_jax.errors import UserError
from medtl_jax.weights.checks import RefusedError
from medtl_jax.weights.hdf5 import read_hdf5
from medtl_jax.weights.npz_files import SUFFIX, read_npz
from medtl_jax.weights.safetensors_files import read_safetensors
from medtl_jax.weights.torch_files import read_legacy, read_zip

MAX_FILE_BYTES = 4 * 2**30

_ACCEPTED = "accepted: torch's .pth (legacy and zip), .safetensors, Keras' .h5, .npz"
_KERAS_ARCHIVE = "model.weights.h5"


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """The tensors of a weight file, under the names and in the layout of the file.

    Attributes:
      tensors: name -> array, finite, C-contiguous, owning its memory; a float, an integer or
        bool of numpy's own (bfloat16 is widened to float32, which is exact).
      sha256: of the whole file, hex.
      format: `"torch-legacy"`, `"torch-zip"`, `"safetensors"`, `"keras-h5"` or `"npz"`.
      path: where it was read from.
      metadata: what a .safetensors file says of itself; empty for the other formats.
    """

    tensors: dict[str, np.ndarray]
    sha256: str
    format: str
    path: pathlib.Path
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)


def read_weights(path: str | pathlib.Path) -> WeightFile:
    """Returns the tensors of the weight file at `path` and its SHA-256.

    The format is told by the content, not by the suffix. Names are those of the file, except:
    a torch state dict may be inside a checkpoint, under `state_dict` or `model` (the other
    entries are left), and loses a `module.` that every name starts with; Keras' names become
    "layer/weight" (see `hdf5.keras_name`).

    Raises:
      UserError: the file cannot be read, is of a format that is not supported, is damaged
        (truncated, trailing bytes, sizes that contradict each other), holds something other
        than named, finite tensors, or names a global that is not allowed.
    """
    path = pathlib.Path(path)
    try:
        data = _read_bytes(path)
        kind, tensors, metadata = _read(data)
    except RefusedError as refusal:
        raise UserError(f"weights file {path}: {refusal}") from None
    except OSError as error:
        raise UserError(f"weights file {path}: {error.strerror or error}") from error
    # A hostile file can make the decoder fail in ways nobody listed; each is the same refusal.
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(f"weights file {path}: damaged ({detail})") from error
    return WeightFile(tensors, hashlib.sha256(data).hexdigest(), kind, path, metadata)


def _read_bytes(path: pathlib.Path) -> bytes:
    size = path.stat().st_size
    # Opening a named pipe would wait for ever.
    if not path.is_file():
        raise RefusedError("not a regular file")
    if not 0 < size <= MAX_FILE_BYTES:
        raise RefusedError(f"{size:,} bytes, not between 1 and {MAX_FILE_BYTES:,}")
    return path.read_bytes()


def _read(data: bytes) -> tuple[str, dict[str, np.ndarray], dict[str, str]]:
    """The format, the tensors and the metadata, by what the content is: suffixes lie."""
    if data.startswith(b"PK\x03\x04"):
        return (*_read_archive(data), {})
    if data.startswith(b"\x89HDF\r\n\x1a\n"):
        return "keras-h5", read_hdf5(data), {}
    # Before the pickle: the header's length may well start with a pickle's first byte.
    if data[8:9] == b"{":
        return "safetensors", *read_safetensors(data)
    if data.startswith(b"\x80"):
        return "torch-legacy", read_legacy(data), {}
    raise RefusedError(f"no weight format known here; {_ACCEPTED}")


def _read_archive(data: bytes) -> tuple[str, dict[str, np.ndarray]]:
    try:
        archive = open_archive(io.BytesIO(data))
    except ArchiveError as error:
        raise RefusedError(str(error)) from error
    names = archive.namelist()
    if any(name.endswith("/data.pkl") for name in names):
        return "torch-zip", read_zip(archive, len(data))
    if names and all(name.endswith(SUFFIX) for name in names):
        return "npz", read_npz(archive, len(data))
    if _KERAS_ARCHIVE in names:
        raise RefusedError(f"a .keras archive: unpack its {_KERAS_ARCHIVE} and name that file")
    raise RefusedError(f"a zip archive, but neither torch's nor an .npz; {_ACCEPTED}")
