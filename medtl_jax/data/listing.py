"""Which file of a tree of class folders belongs to which split and class."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

from medtl_jax.data.catalog import SPLITS
from medtl_jax.data.images import IMAGE_SUFFIXES
from medtl_jax.data.subset import splits_to_read, whole_train
from medtl_jax.errors import UserError

_SIDE_FILES = frozenset({".csv", ".txt", ".md"})
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})


@dataclasses.dataclass(frozen=True)
class Entry:
    """One image of a file-based set, before it is decoded.

    Attributes:
      path: of the image.
      id: its path relative to the set.
      split: train, val or test; "" where that is still to be drawn.
      cells: what the set says of the image, as text: its class, its findings, its numbers.
      patient: None where patients are not known.
      mask, mask2: paths of its mask, and of that of a second observer.
    """

    path: Path
    id: str
    split: str
    cells: tuple[str, ...] = ()
    patient: str | None = None
    mask: Path | None = None
    mask2: Path | None = None


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
        if child.suffix.lower() in IMAGE_SUFFIXES:
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
        if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            raise UserError(
                f"{path} is not an image file ({' '.join(sorted(IMAGE_SUFFIXES))}): "
                "a class folder may hold images only"
            )
    if not images and not may_be_empty:
        raise UserError(f"class folder {folder} is empty: add images or delete the class")
    return images


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in _SYSTEM_FILES
