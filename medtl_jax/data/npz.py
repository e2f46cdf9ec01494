"""Images and targets of one .npz, in the MedMNIST or the Keras layout, checked before reading."""

import dataclasses
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

from medtl_jax.archives import ArchiveError, open_archive, read_npy_header
from medtl_jax.data.catalog import SPLITS, Dataset, DataSpec, Split, absent_classes
from medtl_jax.data.images import (
    Progress,
    allocate_images,
    one_line,
    physical_memory,
    resize_many,
)
from medtl_jax.data.masks import resize_masks, resize_note
from medtl_jax.data.npz_labels import check_label_type, read_targets, task_of_labels
from medtl_jax.data.strata import strata
from medtl_jax.data.subset import TrainPlan, divide, splits_to_read, whole_train
from medtl_jax.data.targets import check_known, check_still_known
from medtl_jax.errors import UserError

MAX_NPZ_BYTES = 16 * 2**30

# Names of the arrays of images and of labels in MedMNIST's and in Keras's layout.
_LAYOUTS = (("{}_images", "{}_labels"), ("x_{}", "y_{}"))
_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a file holds, by its headers.

    Attributes:
      task: one of `catalog.TASKS`, by the shape of the labels where none was asked for.
      images, labels: patterns of the names of a split's arrays.
      splits: those that the file has.
      height, width: of the images, in pixels.
      floats: whether the images are floats.
    """

    images: str
    labels: str
    splits: tuple[str, ...]
    task: str = ""
    height: int = 0
    width: int = 0
    floats: bool = False

    def images_of(self, split: str) -> str:
        """The name of a split's array of images."""
        return self.images.format(split)

    def labels_of(self, split: str) -> str:
        """The name of a split's array of labels."""
        return self.labels.format(split)


def load_npz(
    path: Path,
    image_size: int,
    progress: Progress | None = None,
    classes: tuple[str, ...] | None = None,
    *,
    splits: tuple[str, ...] = SPLITS,
    complete: bool = True,
    plan: TrainPlan | None = None,
    task: str = "",
) -> Dataset:
    """Returns the set of an .npz in one of two layouts, its images resized to `image_size`.

    MedMNIST's holds `{train,val,test}_images` and `{train,val,test}_labels`, Keras's
    `x_{train,val,test}` and `y_{train,val,test}`. Images are `[n, h, w]` or `[n, h, w, c]`, c = 1
    or 3, uint8 or floats in 0..1, which are multiplied by 255 and rounded. Labels are integers
    `[n]` or `[n, 1]`; findings `[n, k]`, 0 or 1, as floats also NaN where they are not known;
    with `task` = regress numbers `[n]` or `[n, k]`, NaN where they are not known; masks
    `[n, h, w]` of the images' size (values as in `masks.decode_mask`). Splits that are not in
    `splits` may be absent and are not read. A `val` that is asked for and absent is carved from
    `train`, by `plan`. Nothing is unpickled.

    Args:
      path: the file.
      image_size: height and width of the result in pixels.
      progress: called as `progress(done, total, text)`.
      classes: names of classes, findings or numbers, where they are known; else "0", "1", ...
      splits: the splits to return.
      complete: with `train` among `splits`, every class needs a training image. False is for
        the `classes` of a trained model, of which some may have no image.
      plan: what to make of the training images; None takes them all, and 0.15 of them for an
        absent `val`.
      task: one of `catalog.TASKS`; "" takes what the shape of the labels says.

    Raises:
      UserError: not such a file; object arrays; wrong dtype, range, shape, count or labels; a
        class without a training image, or with too few for `plan`; more than `MAX_NPZ_BYTES` or
        this machine's memory.
    """
    if not path.is_file():
        raise UserError(f"no such file: {path} (data.dir must be the path of an .npz file)")
    plan = plan or TrainPlan()
    try:
        with path.open("rb") as file, open_archive(file) as archive:
            layout = _check_layout(archive, splits, task, path)
            sources = splits_to_read(splits, layout.splits)
            keys = {name: layout.labels_of(name) for name in sources}
            labels = {name: _read_array(archive, key) for name, key in keys.items()}
            classes, target = read_targets(layout.task, labels, keys, classes, complete, path)
            rows, notes = _choose_rows(target, classes, layout, splits, plan, str(path))
            taken = {key: target["train"][chosen] for key, chosen in rows.get("train", {}).items()}
            _check_divided(taken, classes, layout.task, complete, plan.train_fraction, path)
            parts = {}
            for source in sources:
                images = read_images(archive, layout.images_of(source), path)
                ids = np.array([f"{source}/{index:06d}" for index in range(len(images))])
                for split, chosen in rows[source].items():
                    # A copy only where some images are left out.
                    taken = images if len(chosen) == len(images) else images[chosen]
                    parts[split] = Split(
                        resize_many(taken, image_size, progress),
                        _resized(target[source][chosen], layout.task, image_size),
                        ids[chosen],
                    )
    except (ArchiveError, zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable .npz file: {one_line(error)}") from error
    notes += absent_classes(classes, parts, layout.task)
    if layout.floats:
        notes += ("images are floats of 0..1, scaled to 0..255",)
    if (layout.height, layout.width) != (image_size, image_size):
        size = f"{layout.height} x {layout.width}"
        notes += (f"images of {size} resized to {image_size} x {image_size}",)
    if layout.task == "segment":
        notes += resize_note([(layout.width, layout.height)], image_size)
    return Dataset(DataSpec(path.stem, layout.task, classes, source=str(path), notes=notes), parts)


def _resized(target: np.ndarray, task: str, image_size: int) -> np.ndarray:
    return resize_masks(target, image_size) if task == "segment" else target


def _choose_rows(
    target: dict[str, np.ndarray],
    classes: tuple[str, ...],
    layout: Layout,
    splits: tuple[str, ...],
    plan: TrainPlan,
    path: str,
) -> tuple[dict[str, dict[str, np.ndarray]], tuple[str, ...]]:
    """Returns, for each split of the file, its rows in each split of the set; and notes."""
    rows = {name: {name: np.arange(len(array))} for name, array in target.items()}
    if "train" not in target:
        return rows, ()
    has_val = "val" in layout.splits
    count = len(target["train"])
    division = divide(
        strata(layout.task, target["train"], classes, count),
        [f"train/{index:06d}" for index in range(count)],
        None,
        plan,
        splits=splits,
        has_val=has_val,
        source=path,
        task=layout.task,
    )
    rows["train"] = {"train": division.train} if "train" in splits else {}
    if "val" in splits and not has_val:
        rows["train"]["val"] = division.val
    return rows, whole_train(splits, layout.splits) + division.notes


def _check_divided(
    parts: dict[str, np.ndarray],
    classes: tuple[str, ...],
    task: str,
    complete: bool,
    train_fraction: float,
    path: Path,
) -> None:
    """Raises UserError unless enough is known in the targets that the file's train became."""
    if complete and "train" in parts:
        check_still_known(task, parts["train"], classes, str(path), train_fraction)
    if "val" in parts:
        check_known(task, parts["val"], classes, str(path), "val")


def find_layout(archive: zipfile.ZipFile, path: Path) -> Layout:
    """Returns the layout whose names the file has, the splits with an array in it, or UserError."""
    present = {name.removesuffix(".npy") for name in archive.namelist()}
    found = []
    for images, labels in _LAYOUTS:
        keys = {split: {images.format(split), labels.format(split)} for split in SPLITS}
        splits = tuple(split for split in SPLITS if keys[split] & present)
        if splits:
            found.append(Layout(images, labels, splits))
    if len(found) != 1:
        fault = "has the arrays of both layouts" if found else "has no array of either layout"
        names = ", or ".join(" and ".join(pair) for pair in _LAYOUTS)
        raise UserError(
            f"{path} {fault}: save one of {names.format(*['{split}'] * 4)}, "
            f"for the splits {', '.join(SPLITS)}"
        )
    return found[0]


def _check_layout(
    archive: zipfile.ZipFile, splits: tuple[str, ...], task: str, path: Path
) -> Layout:
    """Returns the file's layout; UserError unless fitting arrays are declared."""
    layout = find_layout(archive, path)
    sources = splits_to_read(splits, layout.splits)
    wanted = [key for name in sources for key in (layout.images_of(name), layout.labels_of(name))]
    present = set(archive.namelist())
    missing = [key for key in wanted if f"{key}.npy" not in present]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)} (needed here: {', '.join(wanted)})")
    headers = {key: read_header(archive, key) for key in wanted}
    declared = sum(math.prod(shape) * dtype.itemsize for shape, dtype in headers.values())
    limit = min(MAX_NPZ_BYTES, physical_memory())
    if declared > limit:
        raise UserError(
            f"{path} declares {declared / 2**30:.1f} GiB of arrays, "
            f"more than the limit of {limit / 2**30:.1f} GiB"
        )
    first, first_labels = layout.images_of(sources[0]), layout.labels_of(sources[0])
    shape, dtype = headers[first]
    task = task_of_labels(first_labels, headers[first_labels][0], task, path)
    for name in sources:
        images, labels = layout.images_of(name), layout.labels_of(name)
        check_images(images, *headers[images], path)
        _check_labels(labels, *headers[labels], task, shape, path)
        found, counted = headers[images], headers[labels][0][0]
        if found[0][0] != counted:
            raise UserError(f"{path}: {name} has {found[0][0]} images but {counted} labels")
        if found[0][1:] != shape[1:]:
            raise UserError(
                f"{path}: {images} are {found[0][1:]}, {first} {shape[1:]}: "
                "all splits need the same image shape"
            )
        if found[1] != dtype:
            raise UserError(f"{path}: {images} must be {dtype}, as {first} is, not {found[1]}")
    height, width = shape[1:3]
    return dataclasses.replace(
        layout, task=task, height=height, width=width, floats=dtype.kind == "f"
    )


def read_header(archive: zipfile.ZipFile, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """Returns shape and dtype that an array's header declares."""
    entry = archive.getinfo(f"{key}.npy")
    with archive.open(entry) as stream:
        return read_npy_header(stream, key, entry.file_size)


def check_images(key: str, shape: tuple[int, ...], dtype: np.dtype, path: Path) -> None:
    """Raises UserError unless an array of this shape and dtype is one of images."""
    if dtype != np.uint8 and dtype.kind != "f":
        raise UserError(f"{path}: {key} must be uint8, or floats of 0..1, not {dtype}")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        raise UserError(f"{path}: {key} has shape {shape}, not [n, h, w] or [n, h, w, 3]")
    _check_filled(key, shape, path)


def _check_labels(
    key: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    task: str,
    images: tuple[int, ...],
    path: Path,
) -> None:
    task_of_labels(key, shape, task, path)
    check_label_type(key, dtype, task, path)
    if task == "segment" and shape[1:] != images[1:3]:
        raise UserError(
            f"{path}: {key} are masks of {shape[1]} x {shape[2]} and their images "
            f"{images[1]} x {images[2]}: save both in one size"
        )
    _check_filled(key, shape, path)


def _check_filled(key: str, shape: tuple[int, ...], path: Path) -> None:
    if min(shape) < 1:
        raise UserError(f"{path}: {key} is empty (shape {shape})")


def read_images(archive: zipfile.ZipFile, key: str, path: Path) -> np.ndarray:
    """Returns uint8 `[n, h, w]` or `[n, h, w, c]`; UserError for floats outside 0..1."""
    images = _read_array(archive, key)
    if images.dtype == np.uint8:
        return images
    if images.ndim == 3:
        images = images[..., None]
    with np.errstate(invalid="ignore"):
        lowest, highest = images.min(), images.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise UserError(f"{path}: {key} has NaN or infinite values: mend them and save it anew")
    if lowest < 0 or highest > 1:
        raise UserError(
            f"{path}: {key} are floats from {lowest!s} to {highest!s}: scale them to 0..1, or "
            "save them as uint8 of 0..255"
        )
    scaled = allocate_images(images.shape)
    for start in range(0, len(images), _BLOCK):
        block = images[start : start + _BLOCK].astype(np.float64)
        scaled[start : start + _BLOCK] = np.rint(255.0 * block)
    return scaled


def _read_array(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    with archive.open(f"{key}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)
