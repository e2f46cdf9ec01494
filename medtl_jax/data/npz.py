"""The MedMNIST .npz layout: six arrays, checked from their headers before anything is read."""

import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

from medtl_jax.data.catalog import SPLITS, Dataset, DataSpec, Split, absent_classes
from medtl_jax.data.images import Progress, one_line, physical_memory, resize_many
from medtl_jax.errors import UserError

MAX_NPZ_BYTES = 16 * 2**30


def load_npz(
    path: Path,
    image_size: int,
    progress: Progress | None = None,
    classes: tuple[str, ...] | None = None,
    *,
    splits: tuple[str, ...] = SPLITS,
    complete: bool = True,
) -> Dataset:
    """Returns the set of a MedMNIST-layout .npz, its images resized to `image_size`.

    The file holds `{train,val,test}_images`, uint8 `[n, h, w]` or `[n, h, w, c]`, c = 1 or 3,
    and `{train,val,test}_labels`, integers `[n]` or `[n, 1]`; those of other splits than `splits`
    may be absent and are not read. Nothing is unpickled.

    Args:
      path: the file.
      image_size: height and width of the result in pixels.
      progress: called as `progress(done, total, text)`.
      classes: class names, where they are known; else "0", "1", ... up to the highest label.
      splits: the splits to read.
      complete: with `train` among `splits`, every class needs a training image. False is for
        the `classes` of a trained model, of which some may have no image.

    Raises:
      UserError: not such a file; object arrays; wrong dtype, shape, count or labels; a class
        without a training image; multi-label; more than `MAX_NPZ_BYTES` or this machine's
        memory.
    """
    if not path.is_file():
        raise UserError(f"no such file: {path} (data.dir must be the path of an .npz file)")
    try:
        with zipfile.ZipFile(path) as archive:
            height, width = _check_layout(archive, splits, path)
            labels = {split: _read_array(archive, f"{split}_labels") for split in splits}
            classes = _check_labels(labels, classes, complete, path)
            parts = {}
            for split in splits:
                images = resize_many(_read_array(archive, f"{split}_images"), image_size, progress)
                ids = np.array([f"{split}/{index:06d}" for index in range(len(images))])
                parts[split] = Split(images, labels[split].reshape(-1).astype(np.int32), ids)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable .npz file: {one_line(error)}") from error
    except (RuntimeError, NotImplementedError) as error:
        # How zipfile answers encrypted entries and unknown compression methods.
        raise UserError(f"{path} cannot be unpacked: {one_line(error)}") from error
    notes = absent_classes(classes, parts)
    if (height, width) != (image_size, image_size):
        notes += (f"images of {height} x {width} resized to {image_size} x {image_size}",)
    return Dataset(DataSpec(path.stem, "classify", classes, source=str(path), notes=notes), parts)


def _check_layout(archive: zipfile.ZipFile, splits: tuple[str, ...], path: Path) -> tuple[int, int]:
    """Returns the images' height and width; UserError unless fitting arrays are declared."""
    wanted = [f"{split}_{part}" for split in splits for part in ("images", "labels")]
    present = set(archive.namelist())
    missing = [key for key in wanted if f"{key}.npy" not in present]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)} (MedMNIST layout: {', '.join(wanted)})")
    declared, shapes = 0, {}
    for key in wanted:
        shape, dtype = _read_header(archive, key, path)
        _check_array(key, shape, dtype, path)
        declared += math.prod(shape) * dtype.itemsize
        shapes[key] = shape
    limit = min(MAX_NPZ_BYTES, physical_memory())
    if declared > limit:
        raise UserError(
            f"{path} declares {declared / 2**30:.1f} GiB of arrays, "
            f"more than the limit of {limit / 2**30:.1f} GiB"
        )
    first = f"{splits[0]}_images"
    for split in splits:
        images, labels = shapes[f"{split}_images"], shapes[f"{split}_labels"]
        if images[0] != labels[0]:
            raise UserError(f"{path}: {split} has {images[0]} images but {labels[0]} labels")
        if images[1:] != shapes[first][1:]:
            raise UserError(
                f"{path}: {split}_images are {images[1:]}, {first} {shapes[first][1:]}: "
                "all splits need the same image shape"
            )
    return shapes[first][1:3]


def _read_header(
    archive: zipfile.ZipFile, key: str, path: Path
) -> tuple[tuple[int, ...], np.dtype]:
    entry = archive.getinfo(f"{key}.npy")
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"{key} has .npy version {version}")
        header = stream.tell()
    if dtype.hasobject:
        raise UserError(
            f"{path}: {key} is an array of Python objects, which are never unpickled: "
            "save it as numbers"
        )
    if entry.file_size != header + math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"{path}: {key} declares {shape} {dtype} but the entry has {entry.file_size} bytes"
        )
    return shape, dtype


def _check_array(key: str, shape: tuple[int, ...], dtype: np.dtype, path: Path) -> None:
    if key.endswith("_images"):
        if dtype != np.uint8:
            raise UserError(f"{path}: {key} must be uint8, not {dtype}")
        if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
            raise UserError(f"{path}: {key} has shape {shape}, not [n, h, w] or [n, h, w, 3]")
    else:
        if dtype.kind not in "iu":
            raise UserError(f"{path}: {key} must be integers, not {dtype}")
        if len(shape) == 2 and shape[1] > 1:
            raise UserError(
                f"{path}: {key} has {shape[1]} columns: multi-label sets are not supported yet"
            )
        if len(shape) not in (1, 2):
            raise UserError(f"{path}: {key} has shape {shape}, not [n] or [n, 1]")
    if min(shape) < 1:
        raise UserError(f"{path}: {key} is empty (shape {shape})")


def _read_array(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    with archive.open(f"{key}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _check_labels(
    labels: dict[str, np.ndarray], classes: tuple[str, ...] | None, complete: bool, path: Path
) -> tuple[str, ...]:
    """Returns the class names, after checking that every label is one and train has them all."""
    values = {split: np.unique(array) for split, array in labels.items()}
    for split, found in values.items():
        if found[0] < 0:
            raise UserError(
                f"{path}: {split}_labels has a negative label ({found[0]}): count from 0"
            )
    highest = max(int(found[-1]) for found in values.values())
    if classes and highest >= len(classes):
        whose = "of the set that the file's name stands for (rename the file if it is another set)"
        if not complete:
            whose = f"that the model knows ({', '.join(classes)})"
        raise UserError(
            f"{path}: label {highest} is out of range for the {len(classes)} classes {whose}"
        )
    count = len(classes) if classes else highest + 1
    if count < 2:
        raise UserError(f"{path}: all labels are 0; a classifier needs two classes or more")
    if complete and "train" in values:
        _check_complete(values["train"].tolist(), count, path)
    return classes or tuple(str(k) for k in range(count))


def _check_complete(train: list[int], count: int, path: Path) -> None:
    """Raises UserError unless the sorted labels `train` are 0..count-1."""
    if len(train) < count:
        gap = next((k for k, label in enumerate(train) if k != label), len(train))
        raise UserError(
            f"{path}: train_labels has {len(train)} of the {count} classes 0..{count - 1}: "
            f"no image of class {gap}"
        )
