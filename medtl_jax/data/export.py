"""Data sets written as class folders, .npz, csv with PNG files, or TFDS: whole or not at all."""

import contextlib
import csv
import dataclasses
import io
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from medtl_jax.data.catalog import MISSING, Array, Dataset, Split
from medtl_jax.data.images import Progress
from medtl_jax.data.strata import CLASS_TASKS
from medtl_jax.data.targets import is_unknown, natural_order
from medtl_jax.errors import UserError

KINDS = ("folder", "npz", "csv", "tfds")

# Called with the number of images that were written since the last call.
Step = Callable[[int], None]
# Writes a set to a draft of the path; returns the configuration that reads it from the path, and
# which of its patients and extra arrays were written.
Writer = Callable[[Dataset, Path, Path, Step], tuple[dict[str, str], set[str]]]

_BLOCK = 64
# Column names of the csv that is written; no finding or number may be called so.
_COLUMNS = ("path", "split", "label", "mask", "patient", "id")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_NO_FILE_NAME = re.compile(r'[/\\:*?"<>|]|^\.|[. ]$')
_LONGEST_NAME = 100


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
      path: the new file or folder.
      config: keys and values of the configuration that read it: "task", "data.name", ...
      notes: what the set has and this kind of it cannot hold.
    """

    path: Path
    config: dict[str, str]
    notes: tuple[str, ...]


def export_dataset(
    dataset: Dataset, kind: str, path: Path, progress: Progress | None = None
) -> Exported:
    """Returns what was written: the set's images, at their present size, and its targets.

    `readers.load_dataset` with the same image size gives the same splits in the same order: images,
    targets, and patients where the kind can hold them. Images and masks are stored as PNG, without
    loss. Streamed sets are written in blocks.

    Kinds:
      folder: `<path>/<split>/<class>/000012.png`, for labels and grades.
      npz: the file `path`, in MedMNIST's layout; the labels of masks are `[n, h, w]`, those of
        findings with unknown ones are floats with NaN.
      csv: `<path>/labels.csv`, with `images/`, `masks/` and `masks2/` beside it.
      tfds: array_record in `<path>/1.0.0`; the last part of `path` is the builder's name.

    Args:
      dataset: the set.
      kind: one of `KINDS`.
      path: does not exist yet.
      progress: called as `progress(done, total, text)`.

    Raises:
      UserError: the path exists or cannot be written, or the kind cannot hold the set. Nothing is
        left behind then.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind '{kind}': choose from {', '.join(KINDS)}")
    _check_texts(dataset)
    step = _Steps(sum(map(len, dataset.splits.values())), progress)
    with _new_path(path) as draft:
        config, kept = _writer(kind)(dataset, draft, path, step)
    task = {"task": dataset.spec.task}
    return Exported(path, task | config, _left_out(dataset, kind, kept))


def _writer(kind: str) -> Writer:
    if kind == "tfds":
        # TFDS is loaded by its users alone.
        from medtl_jax.data.export_tfds import write_tfds

        return write_tfds
    return {"folder": _write_folder, "npz": _write_npz, "csv": _write_csv}[kind]


class _Steps:
    """Counts the images that are done, and tells."""

    def __init__(self, total: int, progress: Progress | None):
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self, count: int) -> None:
        self._done += count
        if self._progress:
            self._progress(self._done, self._total, "writing images")


@contextlib.contextmanager
def _new_path(path: Path) -> Iterator[Path]:
    """Gives a path to write to that becomes `path` at the end, or vanishes after an error."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists: it is not overwritten; choose another name")
    folder = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, so that to move it is one step.
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        yield folder / path.name
        (folder / path.name).rename(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot write {path}: {reason}; free some space or choose another path"
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


# ---- what every kind writes ----------------------------------------------------------------------


def encoded(array: Array) -> Iterator[bytes]:
    """Yields images `[n, h, w, 1 or 3]` or masks `[n, h, w]`, uint8, as PNG files."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(array), _BLOCK):
            yield from pool.map(_png, array[start : start + _BLOCK])


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    grey = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    Image.fromarray(grey).save(stream, "PNG")
    return stream.getvalue()


def _check_texts(dataset: Dataset) -> None:
    """Raises UserError for names that would not come back as they are."""
    patients = (split.patients for split in dataset.splits.values() if split.patients is not None)
    kinds = [("class", dataset.spec.classes)]
    kinds += [("patient", sorted(set(names.tolist()))) for names in patients]
    for kind, names in kinds:
        for name in names:
            if not name or name != name.strip() or _UNPRINTABLE.search(name):
                raise UserError(
                    f"{dataset.spec.name}: the {kind} {name!r} is empty, starts or ends with a "
                    "space or has a control character: rename it"
                )


def _left_out(dataset: Dataset, kind: str, kept: set[str]) -> tuple[str, ...]:
    splits = dataset.splits.values()
    extra = sorted({name for split in splits for name in split.extra} - kept)
    if "patient" not in kept and any(split.patients is not None for split in splits):
        extra.append("patients")
    notes = (f"not written: {', '.join(extra)} ({kind} has no place for them)",) if extra else ()
    if kind != "npz" and all(_all_grey(split.images) for split in splits):
        notes += ("every image is grey: PNG files come back with one channel",)
    return notes


def _all_grey(images: Array) -> bool:
    """Returns whether images of three channels are all grey; False for those of one."""
    if images.shape[-1] == 1:
        return False
    for start in range(0, len(images), _BLOCK):
        block = images[start : start + _BLOCK]
        if (block != block[..., :1]).any():
            return False
    return True


def _named_classes(dataset: Dataset) -> dict[str, str]:
    """Returns data.classes; UserError where the names cannot stand there, separated by commas."""
    spec = dataset.spec
    if odd := [name for name in spec.classes if "," in name]:
        raise UserError(
            f"{spec.name}: '{odd[0]}' has a comma in its name, so that data.classes could not name "
            "it: rename it, or write the set as tfds"
        )
    return {"data.classes": ",".join(spec.classes)}


def _label_classes(dataset: Dataset) -> dict[str, str]:
    """Returns data.classes for labels as text; UserError where their order would be lost."""
    spec = dataset.spec
    if spec.task == "classify" and natural_order(spec.classes) == spec.classes:
        # The labels name the classes as well, also those with a comma.
        return {} if any("," in name for name in spec.classes) else _named_classes(dataset)
    return _named_classes(dataset)


# ---- folder --------------------------------------------------------------------------------------


def _write_folder(
    dataset: Dataset, draft: Path, path: Path, step: Step
) -> tuple[dict[str, str], set[str]]:
    spec = dataset.spec
    if spec.task not in CLASS_TASKS:
        raise UserError(
            f"task={spec.task}: class folders hold the class of each image only; write the set as "
            "csv, npz or tfds"
        )
    for name in spec.classes:
        if _NO_FILE_NAME.search(name) or len(name) > _LONGEST_NAME:
            raise UserError(f"the class {name!r} cannot be the name of a folder: rename it")
    config = {"data.name": "folder", "data.dir": str(path)} | _label_classes(dataset)
    for split_name, split in dataset.splits.items():
        absent = set(range(len(spec.classes))) - set(split.target.tolist())
        if absent:
            raise UserError(
                f"the split {split_name} has no image of class '{spec.classes[min(absent)]}', and "
                "class folders may not be empty: write the set as csv, npz or tfds"
            )
        folders = [draft / split_name / name for name in spec.classes]
        for folder in folders:
            folder.mkdir(parents=True)
        for row, (content, label) in enumerate(
            zip(encoded(split.images), split.target.tolist(), strict=True)
        ):
            (folders[label] / f"{row:06d}.png").write_bytes(content)
            step(1)
    return config, set()


# ---- npz -----------------------------------------------------------------------------------------


def _write_npz(
    dataset: Dataset, draft: Path, path: Path, step: Step
) -> tuple[dict[str, str], set[str]]:
    if path.suffix != ".npz":
        raise UserError(f"{path}: the name of an npz file ends in .npz")
    config = {"data.name": "npz", "data.dir": str(path)} | _named_classes(dataset)
    with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, split in dataset.splits.items():
            _write_array(archive, f"{name}_images", split.images, step)
            _write_array(archive, f"{name}_labels", _npz_labels(dataset, split), lambda count: None)
    return config, set()


def _npz_labels(dataset: Dataset, split: Split) -> Array:
    """Returns the target as MedMNIST stores it: a column of labels, 0 and 1 of the findings."""
    task, target = dataset.spec.task, split.target
    if task in CLASS_TASKS:
        small = len(dataset.spec.classes) <= 256
        return target[:, None].astype(np.uint8 if small else np.int32)
    if task != "multilabel":
        return target
    if (target != MISSING).all():
        return target.astype(np.uint8)
    return np.where(target == MISSING, np.nan, target).astype(np.float32)


def _write_array(archive: zipfile.ZipFile, key: str, array: Array, step: Step) -> None:
    """Adds an array in NumPy's format, a block at a time; one channel has no axis."""
    shape = array.shape
    if len(shape) == 4 and shape[-1] == 1:
        shape = shape[:-1]
    header = {
        "descr": np.lib.format.dtype_to_descr(array.dtype),
        "fortran_order": False,
        "shape": shape,
    }
    with archive.open(f"{key}.npy", "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, len(array), _BLOCK):
            block = array[start : start + _BLOCK]
            stream.write(np.ascontiguousarray(block).data)
            step(len(block))


# ---- csv -----------------------------------------------------------------------------------------


def _write_csv(
    dataset: Dataset, draft: Path, path: Path, step: Step
) -> tuple[dict[str, str], set[str]]:
    _check_cells(dataset)
    columns, config = _csv_columns(dataset)
    draft.mkdir()
    has_patients = all(split.patients is not None for split in dataset.splits.values())
    has_second = all("mask2" in split.extra for split in dataset.splits.values())
    with (draft / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "split", *columns, *["patient"] * has_patients, "id"])
        for name, split in dataset.splits.items():
            _write_pictures(draft / "images" / name, split.images, step)
            rows = _csv_cells(dataset, split)
            if dataset.spec.task == "segment":
                _write_pictures(draft / "masks" / name, split.target)
                rows = ([f"{name}/{row:06d}.png"] for row in range(len(split)))
            if has_second:
                _write_pictures(draft / "masks2" / name, split.extra["mask2"])
            for row, cells in enumerate(rows):
                patient = [split.patients[row]] if has_patients else []
                picture = f"images/{name}/{row:06d}.png"
                writer.writerow([picture, name, *cells, *patient, split.ids[row]])
    config = {"data.name": "csv", "data.dir": str(path / "labels.csv")} | config
    if has_patients:
        config["data.csv_patient_column"] = "patient"
    if has_second:
        config["data.csv_mask2_format"] = "masks2/{}"
    held = {"patient": has_patients, "mask2": has_second}
    return config, {name for name, present in held.items() if present}


def _check_cells(dataset: Dataset) -> None:
    """Raises UserError for a class or patient whose name a csv would read as unknown."""
    names = dataset.spec.classes if dataset.spec.task in CLASS_TASKS else ()
    owners = [split.patients for split in dataset.splits.values() if split.patients is not None]
    for name in (*names, *(str(owner) for patients in owners for owner in patients)):
        if is_unknown(name):
            raise UserError(
                f"{dataset.spec.name}: a csv would read the name '{name}' as a missing one: rename "
                "it, or write the set as tfds"
            )


def _csv_columns(dataset: Dataset) -> tuple[list[str], dict[str, str]]:
    """Returns the target's columns and the configuration that names them."""
    spec = dataset.spec
    if spec.task in CLASS_TASKS:
        return ["label"], {"data.csv_label_column": "label"} | _label_classes(dataset)
    if spec.task == "segment":
        config = {"data.csv_mask_column": "mask", "data.csv_mask_format": "masks/{}"}
        return ["mask"], config | _named_classes(dataset)
    for name in spec.classes:
        if name in _COLUMNS or "," in name:
            raise UserError(
                f"{spec.name}: '{name}' cannot be the name of a column here (it has a comma or is "
                f"one of {', '.join(_COLUMNS)}): rename it"
            )
    return list(spec.classes), {"data.csv_label_column": ",".join(spec.classes)}


def _csv_cells(dataset: Dataset, split: Split) -> Iterator[list[str]]:
    """Yields the cells of each image's label, findings or numbers; empty where unknown."""
    spec = dataset.spec
    if spec.task in CLASS_TASKS:
        return ([spec.classes[label]] for label in split.target.tolist())
    if spec.task == "multilabel":
        return (["" if value == MISSING else str(value) for value in row] for row in split.target)
    # The shortest text that is the same float32.
    return (["" if np.isnan(value) else str(value) for value in row] for row in split.target)


def _write_pictures(folder: Path, array: Array, step: Step = lambda count: None) -> None:
    folder.mkdir(parents=True)
    for row, content in enumerate(encoded(array)):
        (folder / f"{row:06d}.png").write_bytes(content)
        step(1)
