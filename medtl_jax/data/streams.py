"""Images and masks of any number: in memory up to a limit, above it decoded when asked for."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from medtl_jax.data.catalog import Array
from medtl_jax.data.images import (
    Progress,
    decode_in_thread,
    decode_many,
    survey_many,
    with_channels,
)
from medtl_jax.data.masks import check_masks, decode_mask_in_thread, decode_masks
from medtl_jax.data.planes import ImageSource


class Streamed:
    """Images or masks, uint8 `[n, ...]`, decoded from their files each time they are asked for.

    Rows are taken as from a NumPy array, by an index, a slice or indices, and come back as one.
    Nothing is kept: the memory in use is that of the rows asked for. `select` chooses rows without
    reading them. To make an array of the whole is refused (`np.asarray`); `[:]` says it is meant.

    Attributes:
      shape: `(n, ...)`.
      dtype: uint8.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        sources: Sequence[Any],
        decode: Callable[[Any], np.ndarray],
        row_shape: tuple[int, ...],
    ):
        """Takes the n files and `decode(source) -> uint8 row_shape`, which threads may call."""
        self._sources = tuple(sources)
        self._decode = decode
        self.shape = (len(self._sources), *row_shape)

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, rows) -> np.ndarray:
        """The rows at an index, a slice, or indices or a mask `[m]`; threads, one a CPU core.

        Raises:
          UserError: a file cannot be decoded any more.
          IndexError: as for a NumPy array.
        """
        return self.read(rows, threads=os.cpu_count() or 1)

    def read(self, rows, threads: int) -> np.ndarray:
        """Returns `self[rows]`, decoded by so many threads; 1 is the caller's own."""
        indices = np.arange(len(self))[rows]
        if indices.ndim == 0:
            return self._row(int(indices))
        result = np.empty((*indices.shape, *self.shape[1:]), self.dtype)
        flat = result.reshape(-1, *self.shape[1:])

        def fill(place: int, index: int) -> None:
            flat[place] = self._row(index)

        order = indices.ravel().tolist()
        if threads == 1 or len(order) < 2:
            for place, index in enumerate(order):
                fill(place, index)
            return result
        with ThreadPoolExecutor(min(threads, len(order))) as pool:
            for _ in pool.map(fill, range(len(order)), order):
                pass
        return result

    def _row(self, index: int) -> np.ndarray:
        return self._decode(self._sources[index])

    def select(self, rows) -> "Streamed":
        """Returns the same with the rows at a slice or at indices `[m]` alone; none is read."""
        indices = np.arange(len(self))[rows].tolist()
        return Streamed([self._sources[index] for index in indices], self._decode, self.shape[1:])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        raise TypeError("a streamed array may not fit in memory: take rows of it")


def is_streamed(array: Array) -> bool:
    """Returns whether rows of `array` are read from disk when they are asked for."""
    return isinstance(array, Streamed | np.memmap)


def select(array: Array, rows) -> Array:
    """Returns the rows at a slice or at indices `[m]`: of a NumPy array `array[rows]`, of a
    streamed one another streamed one, which has read nothing.
    """
    return array.select(rows) if isinstance(array, Streamed) else array[rows]


def open_images(
    paths: Sequence[ImageSource],
    image_size: int,
    bit_depth: int = 16,
    *,
    channels: int | None = None,
    limit_bytes: float,
    progress: Progress | None = None,
) -> tuple[Array, tuple[str, ...]]:
    """Returns `(images, notes)`: uint8 `[n, s, s, c]` in the order of `paths`, and what was done.

    Up to `limit_bytes` these are a NumPy array. Above, every file is decoded once, to find those
    that cannot be used and to know c and the notes, and the images are `Streamed`. Pixels, notes
    and errors are the same.

    Args:
      paths: the n files, as `images.decode_many` takes them.
      image_size: s, height and width in pixels.
      bit_depth: bits in use in 16-bit files.
      channels: c = 1 or 3; None takes 1 if every image is grey and else 3, grey ones repeated.
      limit_bytes: most bytes of decoded images to hold.
      progress: called as `progress(done, total, text)`.

    Raises:
      UserError: as `images.decode_many`.
    """
    paths = list(paths)
    plane = len(paths) * image_size * image_size
    if plane * (channels or 3) <= limit_bytes:
        return decode_many(paths, image_size, bit_depth, channels=channels, progress=progress)
    found, notes = survey_many(paths, image_size, bit_depth, channels=channels, progress=progress)
    if plane * found <= limit_bytes:
        images, _ = decode_many(paths, image_size, bit_depth, channels=found, progress=progress)
        return images, notes
    row = (image_size, image_size, found)
    decode = functools.partial(_decode_row, row=row, bit_depth=bit_depth)
    note = (
        f"{len(paths)} images of {plane * found / 2**30:.2f} GiB are above data.cache_gb and "
        "stream from their files"
    )
    return Streamed(paths, decode, row), (*notes, note)


def _decode_row(source: ImageSource, row: tuple[int, int, int], bit_depth: int) -> np.ndarray:
    pixels = decode_in_thread(source, row[0], bit_depth)
    return np.broadcast_to(with_channels(pixels, row[2]), row)


def open_masks(
    paths: Sequence[ImageSource],
    image_size: int,
    num_classes: int,
    expected_sizes: Sequence[tuple[int, int]] | None = None,
    *,
    limit_bytes: float,
    progress: Progress | None = None,
) -> Array:
    """Returns the masks, uint8 `[n, s, s]`: in memory up to `limit_bytes`, above it `Streamed`.

    Above, every mask is decoded once to be checked. Arguments and errors are otherwise those of
    `masks.decode_masks`, and so are the values.
    """
    paths = list(paths)
    if len(paths) * image_size * image_size <= limit_bytes:
        return decode_masks(paths, image_size, num_classes, expected_sizes, progress)
    check_masks(paths, image_size, num_classes, expected_sizes, progress)
    decode = functools.partial(
        decode_mask_in_thread, image_size=image_size, num_classes=num_classes
    )
    return Streamed(paths, decode, (image_size, image_size))


def stream_batches(
    arrays: Mapping[str, Array], indices: np.ndarray, *, threads: int = 0, buffer: int = 4
) -> Iterator[dict[str, np.ndarray]]:
    """Yields `{name: array[row]}` for each row of `indices`, in order, read ahead by threads.

    The batches are those of arrays in memory, whatever `threads` and `buffer` are. Grain does the
    reading; it ends with the iterator, also where that is abandoned before its end.

    Args:
      arrays: arrays of equal length, streamed or in memory.
      indices: integers `[steps, b]`, such as `loader.training_indices`.
      threads: that decode, a batch each; 0 takes one a CPU core.
      buffer: batches to hold ready, at least one a thread. The memory in use is theirs.

    Raises:
      UserError: a file cannot be decoded any more.
      IndexError: an index is out of range.
    """
    # Grain takes a second to load and only streamed sets need it.
    import grain

    threads = threads or os.cpu_count() or 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(buffer, threads))

    def batch(rows: np.ndarray) -> dict[str, np.ndarray]:
        return {name: _take(array, rows) for name, array in arrays.items()}

    source = grain.MapDataset.source(np.asarray(indices))
    with contextlib.closing(iter(source.map(batch).to_iter_dataset(options))) as batches:
        yield from batches


def _take(array: Array, rows: np.ndarray) -> np.ndarray:
    return array.read(rows, threads=1) if isinstance(array, Streamed) else array[rows]
