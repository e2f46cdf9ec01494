"""The part of the benchmark on input: from files, and from memory, to batches on the device."""

import argparse
import functools
import itertools
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterator

# It prepares the process, before jax is imported.
from experiments.benchmark_timing import (
    NOTE,
    Row,
    Section,
    Timer,
    alternate,
    measured_row,
    milliseconds,
    repeated,
)

# isort: split
import jax
import numpy as np
from PIL import Image

from experiments.benchmark_steps import BATCHES, random_images
from medtl_jax.data.npz import load_npz
from medtl_jax.data.streams import open_images, stream_batches
from medtl_jax.training.devices import data_mesh
from medtl_jax.training.step import take

# Side of the images in the files, pixels.
STORED = 256
# More images than that are these, several times over.
_MOST_FILES = 128
_FORMATS = {"PNG": "png", "JPEG": "jpg"}


def input_section(options: argparse.Namespace) -> Section:
    """What the readers of `medtl_jax.data` make of files of `STORED` pixels in a folder of its own.

    An iteration is a pass over `BATCHES` batches. Files are decoded by one thread a core; the
    system has them in its cache.
    """
    columns = ("images from", "to", "images/s", "ms a batch", NOTE)
    return Section(f"Input alone, colour images of {STORED} px", columns, _rows(options))


def _rows(options: argparse.Namespace) -> Iterator[Row]:
    count, size = BATCHES * options.batch, options.size
    with tempfile.TemporaryDirectory(prefix="medtl_jax-benchmark-") as name:
        folder = pathlib.Path(name)
        _write(folder, count)
        works: dict[tuple[str, str], Callable[[], Timer]] = {
            ("npz file", "memory"): functools.partial(_read_npz, folder, size)
        }
        for kind, suffix in _FORMATS.items():
            files = sorted(folder.glob(f"*.{suffix}"))
            paths = list(itertools.islice(itertools.cycle(files), count))
            decode = functools.partial(_decode, paths, size)
            works[f"{kind} files", "memory"] = decode
            stream = functools.partial(_stream, paths, size, options.batch)
            works[f"{kind} files", "batches, streamed to the device"] = stream
        works["the device's memory", "batches"] = functools.partial(
            _gather, random_images(count, size), options.batch
        )
        for (source, target), make in works.items():
            work = functools.partial(_measure, make, count, options)
            yield measured_row({"images from": source, "to": target}, work)


def _measure(make: Callable[[], Timer], count: int, options: argparse.Namespace) -> Row:
    (seconds,) = alternate([make()], options.rounds, options.seconds)
    return {"images/s": f"{count / seconds:.0f}", "ms a batch": milliseconds(seconds / BATCHES)}


def _write(folder: pathlib.Path, count: int) -> None:
    """Leaves up to `_MOST_FILES` images of each format in `folder`, and an .npz of `count`."""
    draw = np.random.default_rng(0)
    # Smooth with some noise: plain noise would compress, and be decoded, as no photograph is.
    coarse = draw.integers(0, 230, (min(count, _MOST_FILES), STORED // 8, STORED // 8, 3), np.uint8)
    pictures = [
        Image.fromarray(one).resize((STORED, STORED), Image.Resampling.BICUBIC) for one in coarse
    ]
    grain = draw.integers(0, 6, (STORED, STORED, 3), np.uint8)
    smooth = np.stack([np.asarray(picture) for picture in pictures]).clip(0, 249)
    images = smooth + grain
    for number, image in enumerate(images):
        for kind, suffix in _FORMATS.items():
            Image.fromarray(image).save(folder / f"{number:04d}.{suffix}", kind)
    rows = np.arange(count)
    np.savez(folder / "set.npz", train_images=images[rows % len(images)], train_labels=rows % 2)


def _read_npz(folder: pathlib.Path, size: int) -> Timer:
    def read(_):
        return None, load_npz(folder / "set.npz", size, splits=("train",)).splits["train"].images

    return repeated(read, None)


def _decode(paths: list[pathlib.Path], size: int) -> Timer:
    return repeated(lambda _: (None, open_images(paths, size, limit_bytes=math.inf)[0]), None)


def _stream(paths: list[pathlib.Path], size: int, batch: int) -> Timer:
    mesh = data_mesh()
    images, _ = open_images(paths, size, limit_bytes=0)
    rows = np.arange(len(paths)).reshape(-1, batch)

    def stream(_):
        for found in stream_batches({"image": images}, rows):
            placed = mesh.place_rows(found, batch)
        return None, placed

    return repeated(stream, None)


def _gather(images: np.ndarray, batch: int) -> Timer:
    """Batches of a set that lies on the devices, as a training step takes them."""
    mesh = data_mesh()
    data = mesh.place({"train": {"image": images}}, mesh.replicated)
    gather = jax.jit(take)
    rows = np.random.default_rng(0).permutation(len(images)).astype(np.int32).reshape(-1, batch)

    def batches(_):
        return None, [gather(data, mesh.place({"train": row}, mesh.batched)) for row in rows]

    return repeated(batches, None)
