"""The target of an adaptation, read with the labels that it has, which may be none."""

import contextlib
import dataclasses
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medtl_jax.archives import ArchiveError, open_archive
from medtl_jax.data.catalog import SPLITS, Array, Dataset, DataSpec, Split
from medtl_jax.data.csvlist import split_names
from medtl_jax.data.domains import most_channels, other_classes, with_channels
from medtl_jax.data.images import Progress, one_line, physical_memory, resize_many, to_grey
from medtl_jax.data.medical import KINDS, check_channels, find_images, is_image, reading_of
from medtl_jax.data.npz import (
    MAX_NPZ_BYTES,
    Layout,
    check_images,
    find_layout,
    read_header,
    read_images,
)
from medtl_jax.data.readers import load_dataset
from medtl_jax.data.streams import open_images
from medtl_jax.errors import UserError
from medtl_jax.files import user_path

# Sets whose classes have names of their own, in an order of their own.
_NAMED = ("phantom", "medmnist/", "tfds/")


def read_target(
    config: Mapping[str, Any],
    like: DataSpec,
    image_size: int,
    progress: Progress | None = None,
    *,
    splits: Sequence[str] = ("train", "test"),
    grey: bool = False,
) -> Dataset:
    """Returns the target set that `config` names, with or without labels.

    It is read by `readers.load_dataset`, all of its training images. Where nobody has labelled a
    split of a folder or an .npz, its target is int8 `[n, 0]` (see `has_labels`):

      folder: `<dir>/<split>/<image>`, without class folders; or `<dir>/<image>` without splits,
        which is `train`.
      npz: images of the split without an array of labels.

    A folder or .npz without the split `test` gives a set without it, and a note; so does one
    without `val` whose `train` has no labels to carve it by.

    Args:
      config: keys as the section `data`.
      like: of the source: the task, and the classes of which the target has to be.
      image_size: s, height and width in pixels.
      progress: called as `progress(done, total, text)`.
      splits: to read; `train` among them.
      grey: whether colour images become grey, for a model of grey ones.

    Raises:
      UserError: anything in the data or the configuration that the user has to mend.
    """
    config = {**config, "per_class": 0, "train_fraction": 1.0}
    found = _labelled_splits(config, like)
    absent = _absent(splits, found)
    bare = [name for name in splits if found is not None and found.get(name) is False]
    labelled = tuple(name for name in splits if name not in (*absent, *bare))
    parts: dict[str, Split] = {}
    place = str(config.get("dir") or "")
    spec = DataSpec(str(config["name"]), like.task, like.classes, source=place)
    if labelled:
        whole = _read_labelled(config, like, image_size, progress, labelled, grey)
        spec, parts = whole.spec, dict(whole.splits)
    notes = [f"the target has no split {name}" for name in absent]
    if bare:
        read, said = read_unlabelled(config, image_size, progress, splits=bare, grey=grey)
        parts |= read
        notes += [*said, f"the target has no labels in {' and '.join(bare)}"]
    spec = dataclasses.replace(spec, notes=(*spec.notes, *notes))
    ordered = {name: parts[name] for name in SPLITS if name in parts}
    return Dataset(spec, with_channels(ordered, most_channels(ordered.values())))


def read_unlabelled(
    config: Mapping[str, Any],
    image_size: int,
    progress: Progress | None = None,
    *,
    splits: Sequence[str] = ("train",),
    grey: bool = False,
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Returns `(splits, notes)` of a folder or an .npz without labels, as `read_target` has them.

    The images of a folder above `cache_gb` stream from their files. Other files beside them are
    left out.

    Args:
      config: keys name ("folder" or "npz"), dir and, for a folder, bit_depth (16), cache_gb (4.0)
        and those of `medical.reading_of`.
      image_size: s, height and width in pixels.
      progress: called as `progress(done, total, text)`.
      splits: to read.
      grey: whether colour images become grey.

    Raises:
      UserError: anything in the data that the user has to mend; another kind of set.
    """
    path = user_path(str(config.get("dir") or ""), "data.dir")
    if config["name"] not in ("folder", "npz"):
        raise UserError(
            f"data.name={config['name']}: images without labels are read from a folder or an .npz"
        )
    found, notes = {}, ()
    if config["name"] == "npz":
        for name, images in _read_npz(path, image_size, progress, splits).items():
            ids = [f"{name}/{row:06d}" for row in range(len(images))]
            found[name] = _bare(to_grey(images) if grey else images, ids)
        return found, notes
    for name in splits:
        folder = path / name if (path / name).is_dir() else path
        files = _images_of(folder)
        if not files:
            raise UserError(f"no images ({KINDS}) in {folder}")
        reading = reading_of(config)
        check_channels(reading, grey)
        listed = [(file, f"{name}/{file.name}") for file in files]
        parts = [part for some in find_images(listed, reading, progress) for part in some]
        images, said = open_images(
            [part.source for part in parts],
            image_size,
            config.get("bit_depth", 16),
            channels=1 if grey else None,
            limit_bytes=2**30 * config.get("cache_gb", 4.0),
            progress=progress,
        )
        found[name] = _bare(images, [part.id for part in parts])
        notes += said
    return found, notes


def _bare(images: Array, ids: Sequence[str]) -> Split:
    return Split(images, np.zeros((len(images), 0), np.int8), np.array(ids))


def _read_labelled(
    config: Mapping[str, Any],
    like: DataSpec,
    image_size: int,
    progress: Progress | None,
    splits: tuple[str, ...],
    grey: bool,
) -> Dataset:
    """The splits with labels. A class of the source need not have an image in them."""
    classes = split_names(str(config.get("classes") or ""), "data.classes") or like.classes
    if str(config["name"]).startswith(_NAMED):
        classes = None
    read = load_dataset(
        config, image_size, progress, task=like.task, classes=classes, splits=splits, grey=grey
    )
    numbers = tuple(str(number) for number in range(len(like.classes)))
    if config["name"] != "npz" or config.get("classes") or like.classes == numbers:
        return read
    meant = ", ".join(f"{k} is {name}" for k, name in enumerate(like.classes))
    note = f"the target's labels are numbers, taken as the source's classes: {meant}"
    spec = dataclasses.replace(read.spec, notes=(*read.spec.notes, note))
    return dataclasses.replace(read, spec=spec)


def _absent(splits: Sequence[str], found: Mapping[str, bool] | None) -> list[str]:
    """The splits that a set may do without; a labelled `train` stands in for a `val`."""
    if found is None:
        return []
    optional = ("test",) if found.get("train") else ("val", "test")
    return [name for name in splits if name in optional and name not in found]


def _labelled_splits(config: Mapping[str, Any], like: DataSpec) -> dict[str, bool] | None:
    """Whether each split of a folder or .npz has labels; None of another kind of set."""
    kind, text = config["name"], str(config.get("dir") or "")
    if kind not in ("folder", "npz") or not text:
        return None
    path = user_path(text, "data.dir")
    if kind == "npz":
        return _labelled_of_npz(path) if path.is_file() else None
    return _labelled_of_folder(path, like) if path.is_dir() else None


def _labelled_of_folder(root: Path, like: DataSpec) -> dict[str, bool]:
    present = [name for name in SPLITS if (root / name).is_dir()]
    if not present:
        # What is not images alone is the labelled reader's to refuse.
        return {"train": bool(_folders_of(root)) or not _images_of(root)}
    found = {}
    for name in present:
        folders = _folders_of(root / name)
        if not set(folders) <= set(like.classes):
            raise other_classes(like, str(root / name), folders)
        if not folders and not _images_of(root / name):
            raise UserError(f"the target's folder {root / name} has no images: add some")
        found[name] = bool(folders)
    return found


def _folders_of(folder: Path) -> tuple[str, ...]:
    """The names of the folders in a folder, those that are not hidden."""
    children = (child for child in sorted(folder.iterdir()) if child.is_dir())
    return tuple(child.name for child in children if not child.name.startswith("."))


def _images_of(folder: Path) -> list[Path]:
    """The image files in a folder, by name."""
    return [
        child
        for child in sorted(folder.iterdir())
        if is_image(child) and not child.name.startswith(".")
    ]


@contextlib.contextmanager
def _open_npz(path: Path) -> Iterator[tuple[zipfile.ZipFile, Layout]]:
    """Yields the archive and its layout, the errors of a damaged file as one clear line."""
    try:
        with path.open("rb") as file, open_archive(file) as archive:
            yield archive, find_layout(archive, path)
    except (ArchiveError, zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable .npz file: {one_line(error)}") from error


def _labelled_of_npz(path: Path) -> dict[str, bool]:
    with _open_npz(path) as (archive, layout):
        names = set(archive.namelist())
        return {name: f"{layout.labels_of(name)}.npy" in names for name in layout.splits}


def _read_npz(
    path: Path, image_size: int, progress: Progress | None, splits: Sequence[str]
) -> dict[str, np.ndarray]:
    """The images of splits of an .npz, whatever else is in it."""
    with _open_npz(path) as (archive, layout):
        keys = {name: layout.images_of(name) for name in splits}
        present = set(archive.namelist())
        if missing := [key for key in keys.values() if f"{key}.npy" not in present]:
            raise UserError(f"{path} lacks {', '.join(missing)}")
        headers = {key: read_header(archive, key) for key in keys.values()}
        for key, header in headers.items():
            check_images(key, *header, path)
        declared = sum(math.prod(shape) * dtype.itemsize for shape, dtype in headers.values())
        if declared > (limit := min(MAX_NPZ_BYTES, physical_memory())):
            raise UserError(
                f"{path} declares {declared / 2**30:.1f} GiB of images, more than the limit of "
                f"{limit / 2**30:.1f} GiB"
            )
        return {
            name: resize_many(read_images(archive, key, path), image_size, progress)
            for name, key in keys.items()
        }
