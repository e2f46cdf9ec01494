"""Which file of a tree of class folders belongs to which split and class."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from medtl_jax.data.catalog import SPLITS
from medtl_jax.data.images import Progress
from medtl_jax.data.medical import (
    KINDS,
    Found,
    Reading,
    find_images,
    is_image,
    patients_note,
    read_layout_or_refuse,
    series_files,
)
from medtl_jax.data.nifti import Layout, NiftiSlice, is_nifti
from medtl_jax.data.planes import ImageSource, Plane, Stack
from medtl_jax.data.subset import splits_to_read, whole_train
from medtl_jax.errors import UserError

_SIDE_FILES = frozenset({".csv", ".txt", ".md"})
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})


@dataclasses.dataclass(frozen=True)
class Entry:
    """One image of a file-based set, before it is decoded.

    Attributes:
      path: of the file, or of the folder of a DICOM series; after `expand` what the image is
        decoded from.
      id: its path relative to the set, with `#k` for the k-th image of a file with several.
      split: train, val or test; "" where that is still to be drawn.
      cells: what the set says of the image, as text: its class, its findings, its numbers.
      patient: None where patients are not known.
      mask, mask2: its mask, and that of a second observer: a picture's path, or of a volume first
        the path and after `expand` the slice.
    """

    path: ImageSource
    id: str
    split: str
    cells: tuple[str, ...] = ()
    patient: str | None = None
    mask: Path | Plane | None = None
    mask2: Path | Plane | None = None


def list_folder(
    root: Path, splits: Collection[str], classes: Collection[str] | None = None
) -> tuple[list[Entry], tuple[str, ...]]:
    """Returns the images of `<root>/<split>/<class>/`, and notes.

    They are sorted by split, name of the file and class: images that were numbered before they
    were put into classes keep their order.

    Args:
      root: the folder; it may hold train, val and test, and other files than images.
      splits: the splits to list; `train` stands in for a `val` that has to be carved from it.
      classes: names whose folders may be absent or empty; None asks that all splits have the
        same class folders, none of them empty.

    Raises:
      UserError: a split without a folder, or a folder or file where none may be.
    """
    if not root.is_dir():
        raise UserError(f"no such folder: {root} (data.dir)")
    for child in sorted(root.iterdir()):
        if child.name.startswith(".") or child.name in SPLITS:
            continue
        if child.is_dir():
            raise UserError(
                f"unexpected folder {child}: {root} may hold train, val and test only, with the "
                f"class folders in them, such as {root / 'test' / child.name}"
            )
        if is_image(child):
            raise UserError(f"{child} lies outside the class folders: move it into one")
    present = {split for split in SPLITS if (root / split).is_dir()}
    needed = splits_to_read(splits, present)
    for split in needed:
        if split not in present:
            raise UserError(f"no folder {root / split}: expected {root / split}/<class>/<image>")
    found = {split: _class_folders(root / split) for split in needed}
    if classes is None:
        _check_same_classes(root, found)
    entries = [
        Entry(path, path.relative_to(root).as_posix(), split, (folder.name,))
        for split, folders in found.items()
        for folder in folders
        for path in _class_images(folder, may_be_empty=folder.name in (classes or ()))
    ]
    entries.sort(key=lambda entry: (SPLITS.index(entry.split), entry.path.name, entry.cells))
    return entries, whole_train(splits, present)


def patient_pattern(config: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Returns the key patient_pattern of `config`, the section `data`; None where it is empty.

    UserError for no regular expression, or where no names of files are read or a csv has patients.
    """
    text = str(config.get("patient_pattern") or "")
    if not text:
        return None
    if config.get("name") not in ("folder", "csv") or config.get("csv_patient_column"):
        raise UserError(
            f"data.patient_pattern={text!r} is for data.name=folder, or csv without "
            "data.csv_patient_column: leave it empty"
        )
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(
            f"data.patient_pattern={text!r} is no regular expression: {error}"
        ) from None


def name_patients(
    entries: Sequence[Entry], pattern: re.Pattern[str] | None, source: Path
) -> list[Entry]:
    """Returns the entries with the patients that `pattern` finds in the names of their files.

    UserError for a name without a patient.
    """
    if pattern is None:
        return list(entries)
    named = []
    for entry in entries:
        found = pattern.search(PurePosixPath(entry.id).name)
        patient = found and (found[1] if pattern.groups else found[0])
        if not patient:
            raise UserError(
                f"{source}: data.patient_pattern={pattern.pattern!r} finds no patient in the name "
                f"of {entry.id}: make it fit every file"
            )
        named.append(dataclasses.replace(entry, patient=patient))
    return named


def expand(
    entries: Sequence[Entry], reading: Reading, progress: Progress | None = None
) -> tuple[list[Entry], tuple[str, ...]]:
    """Returns an entry for each image in the files of `entries`, in their order, and notes.

    The images of one file, or of a series, share what the set says of it. Where it does not say
    the patients and any file is not a picture, they are what the files say (`medical.Found`), and
    a picture is its own patient.

    Args:
      entries: one for each file or folder of a series.
      reading: how they are read.
      progress: called as `progress(done, total, text)`.

    Raises:
      UserError: files that cannot be used, or masks that do not belong to their images.
    """
    found = find_images([(entry.path, entry.id) for entry in entries], reading, progress)
    known = any(entry.patient is not None for entry in entries)
    named = not known and any(image.key for images in found for image in images)
    masks = {
        mask: read_layout_or_refuse(mask)
        for entry in entries
        for mask in (entry.mask, entry.mask2)
        if mask is not None and is_nifti(mask)
    }
    expanded = []
    for entry, images in zip(entries, found, strict=True):
        for image in images:
            expanded.append(
                dataclasses.replace(
                    entry,
                    path=image.source,
                    id=image.id,
                    patient=(image.patient or image.id) if named else entry.patient,
                    mask=_mask_of(image, entry.mask, len(images), masks),
                    mask2=_mask_of(image, entry.mask2, len(images), masks),
                )
            )
    note = patients_note([image for images in found for image in images]) if named else ()
    return expanded, note


def _mask_of(
    image: Found, mask: Path | None, count: int, layouts: Mapping[Path, Layout]
) -> Path | Plane | None:
    """Returns the mask of one of the `count` images that share it."""
    if mask is None:
        return None
    source = image.source.planes[1] if isinstance(image.source, Stack) else image.source
    if mask not in layouts:
        if count > 1:
            raise UserError(
                f"{mask} is one mask, and {image.source} one of {count} images of its file: use a "
                "NIfTI mask, or list the images (file#0, file#1, ...)"
            )
        return mask
    if not isinstance(source, NiftiSlice) or not layouts[mask].same_grid(source.layout):
        raise UserError(
            f"the mask {mask} does not have the voxels of {image.source}: a NIfTI mask needs a "
            "NIfTI volume of the same shape and affine"
        )
    name = f"{mask}#{source.index}"
    return dataclasses.replace(source, path=mask, layout=layouts[mask], name=name)


def _check_same_classes(root: Path, found: Mapping[str, list[Path]]) -> None:
    wanted = {folder.name for folder in found["train"]}
    for split, folders in found.items():
        difference = sorted(wanted ^ {folder.name for folder in folders})
        if difference:
            raise UserError(
                f"the class folders of {root / split} and {root / 'train'} differ: "
                f"{', '.join(difference)} in one of them only"
            )


def _class_folders(split_folder: Path) -> list[Path]:
    folders = []
    for child in sorted(split_folder.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            folders.append(child)
        elif not _is_hidden(child) and child.suffix.lower() not in _SIDE_FILES:
            raise UserError(f"{child} lies outside the class folders: move or delete it")
    if not folders:
        raise UserError(f"{split_folder} has no class folders: expected {split_folder}/<class>/")
    return folders


def _class_images(folder: Path, may_be_empty: bool) -> list[Path]:
    images = [child for child in sorted(folder.iterdir()) if not _is_hidden(child)]
    for path in images:
        if not (series_files(path) if path.is_dir() else path.is_file() and is_image(path)):
            raise UserError(
                f"{path} is not an image file ({KINDS}), nor a folder of DICOM files alone: a "
                "class folder may hold images only"
            )
    if not images and not may_be_empty:
        raise UserError(f"class folder {folder} is empty: add images or delete the class")
    return images


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in _SYSTEM_FILES
