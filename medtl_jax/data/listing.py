"""Which file belongs to which split and class: class folders and csv lists."""

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from medtl_jax.data.catalog import SPLITS
from medtl_jax.data.images import IMAGE_SUFFIXES, one_line
from medtl_jax.data.subset import splits_to_read, whole_train
from medtl_jax.errors import UserError

_SIDE_FILES = frozenset({".csv", ".txt", ".md"})
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})


@dataclasses.dataclass(frozen=True)
class Entry:
    """One image of a file-based set, before it is decoded; `id` is its relative path."""

    path: Path
    id: str
    split: str
    label: str
    patient: str | None = None


def list_folder(
    root: Path, splits: Collection[str], classes: Collection[str] | None = None
) -> tuple[list[Entry], tuple[str, ...]]:
    """Returns the images of `<root>/<split>/<class>/`, sorted by split, class and name, and notes.

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
            raise UserError(f"unexpected folder {child}: {root} may hold train, val and test only")
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
        Entry(path, path.relative_to(root).as_posix(), split, folder.name)
        for split, folders in found.items()
        for folder in folders
        for path in _class_images(folder, may_be_empty=folder.name in (classes or ()))
    ]
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


def list_csv(
    path: Path, config: Mapping[str, Any], splits: Collection[str]
) -> tuple[list[Entry], tuple[str, ...]]:
    """Returns the rows of `splits` (as in `list_folder`), and notes.

    Every row of the file is checked, those of other splits too: a patient who is in two splits
    is a mistake of the whole list.

    Raises:
      UserError: a file, header or row that cannot be used, a split without rows, an image listed
        twice, or a patient in two splits.
    """
    keys = ("csv_path_column", "csv_split_column", "csv_label_column", "csv_patient_column")
    defaults = ("path", "split", "label", "")
    columns = [str(config.get(key, default)) for key, default in zip(keys, defaults, strict=True)]
    if not all(columns[:3]):
        raise UserError("data.csv_path_column, csv_split_column and csv_label_column need a name")
    wanted = [column for column in columns if column]
    header, rows = _read_table(path, wanted)
    where = {column: header.index(column) for column in wanted}
    entries = []
    for line, row in rows:
        cells = {column: row[index] for column, index in where.items()}
        for column, cell in cells.items():
            if not cell:
                raise UserError(f"{path}, line {line}: column '{column}' is empty")
        relative = _relative_path(cells[columns[0]], f"{path}, line {line}")
        split = cells[columns[1]]
        if split not in SPLITS:
            raise UserError(f"{path}, line {line}: split '{split}' is not train, val or test")
        patient = cells[columns[3]] if columns[3] else None
        entries.append(Entry(path.parent / relative, relative, split, cells[columns[2]], patient))
    _check_rows(entries, path)
    present = {entry.split for entry in entries}
    needed = splits_to_read(splits, present)
    for split in needed:
        if split not in present:
            raise UserError(f"{path} has no rows of split '{split}'")
    notes = whole_train(splits, present)
    if not columns[3]:
        notes += ("no patient column (data.csv_patient_column): leakage of patients not checked",)
    return [entry for entry in entries if entry.split in needed], notes


def _read_table(path: Path, wanted: Sequence[str]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Returns the header and `(line number, cells)` of each row; blank lines are left out."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it as 'CSV UTF-8'") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): data.dir must be a csv") from error
    (_, names), *rows = _parse(text, _delimiter(text, wanted), path)
    for column in wanted:
        if names.count(column) != 1:
            found = "occurs twice" if column in names else "is missing"
            raise UserError(f"{path}: column '{column}' {found}; columns: {', '.join(names)}")
    for line, row in rows:
        if len(row) != len(names):
            raise UserError(f"{path}, line {line}: {len(row)} cells, the header has {len(names)}")
    if not rows:
        raise UserError(f"{path} has a header but no rows")
    return names, rows


def _delimiter(text: str, wanted: Sequence[str]) -> str:
    """Returns the one of `,` `;` tab that finds the wanted columns, or else the most columns."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    headers = {
        delimiter: [name.strip(' "') for name in first.split(delimiter)] for delimiter in ",;\t"
    }
    return max(headers, key=lambda key: (set(wanted) <= set(headers[key]), len(headers[key])))


def _parse(text: str, delimiter: str, path: Path) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        table = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {one_line(error)}") from error
    if not table:
        raise UserError(f"{path} is empty")
    return table


def _relative_path(cell: str, place: str) -> str:
    """Returns the path in its shortest form; UserError where it may leave the csv's folder."""
    posix, windows = PurePosixPath(cell), PureWindowsPath(cell)
    if posix.is_absolute() or windows.anchor:
        raise UserError(f"{place}: '{cell}' is absolute; paths are relative to the csv's folder")
    if ".." in posix.parts or ".." in windows.parts:
        raise UserError(f"{place}: '{cell}' leaves the csv's folder; move the csv above the images")
    return posix.as_posix()


def _check_rows(entries: list[Entry], path: Path) -> None:
    name, count = Counter(entry.id for entry in entries).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: '{name}' is listed {count} times; list each image once")
    homes: dict[str, set[str]] = {}
    for entry in entries:
        if entry.patient is not None:
            homes.setdefault(entry.patient, set()).add(entry.split)
    leaks = sorted(patient for patient, found in homes.items() if len(found) > 1)
    if leaks:
        raise UserError(
            f"{path}: {len(leaks)} patients are in more than one split (first: "
            f"{', '.join(leaks[:3])}); put all images of a patient into one split"
        )
