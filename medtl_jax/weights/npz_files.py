"""An .npz archive of arrays (Caffe's or Keras' names) -> flat arrays, nothing unpickled."""

import io
import zipfile

import numpy as np

from medtl_jax.archives import ArchiveError, read_entry, read_npy_header
from medtl_jax.weights.checks import (
    RefusedError,
    check_name,
    check_shape,
    check_total,
    finished,
    is_plain,
    shown,
    unpacked_limit,
)

SUFFIX = ".npy"


def read_npz(archive: zipfile.ZipFile, size: int) -> dict[str, np.ndarray]:
    """Returns name (as in the archive, without `.npy`) -> array, from a file of `size` bytes.

    `archive` comes from `archives.open_archive`, which has checked its names and sizes.

    Raises:
      RefusedError: damaged; an array of Python objects, texts, complex numbers or records, an
        empty one, or one whose header contradicts its size; more bytes than a file of this
        size should unpack to.
    """
    infos = archive.infolist()
    check_total(sum(info.file_size for info in infos), unpacked_limit(size), size)
    tensors = {}
    for info in infos:
        name = info.filename.removesuffix(SUFFIX)
        check_name(name)
        try:
            tensors[name] = finished(name, _array(name, read_entry(archive, info)))
        except ArchiveError as error:
            raise RefusedError(str(error)) from error
        except ValueError as error:
            raise RefusedError(f"tensor {shown(name)}: {' '.join(str(error).split())}") from error
    return tensors


def _array(name: str, data: bytes) -> np.ndarray:
    stream = io.BytesIO(data)
    shape, dtype = read_npy_header(stream, name, len(data))
    check_shape(name, shape)
    if not is_plain(dtype):
        raise RefusedError(f"tensor {shown(name)} has dtype {dtype}, no plain number")
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)
