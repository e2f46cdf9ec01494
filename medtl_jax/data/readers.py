"""One `Dataset` from `config.data`: the phantom, MedMNIST, .npz files, class folders, csv lists."""

import csv
import dataclasses
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from medtl_jax.data.carve import carve
from medtl_jax.data.catalog import Dataset, DataSpec, Split
from medtl_jax.data.images import IMAGE_SUFFIXES, Progress, decode_many, one_line
from medtl_jax.data.medmnist import classes_by_file_name, load_medmnist
from medtl_jax.data.npz import SPLITS, load_npz
from medtl_jax.errors import UserError

NAMES = ("phantom", "npz", "medmnist/<flag>", "folder", "csv")

_SIDE_FILES = frozenset({".csv", ".txt", ".md"})
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One image of a file-based set, before it is decoded; `id` is its relative path."""

    path: Path
    id: str
    split: str
    label: str
    patient: str | None = None


def load_dataset(
    config: Mapping[str, Any], image_size: int, progress: Progress | None = None
) -> Dataset:
    """Returns the data set that `config` (the section `data`) names, decoded and resized.

    Images are uint8 `[n, s, s, c]` with one c for all splits; labels int32 `[n]`.

    Names:
      phantom: synthetic images, sizes and domain from `config.phantom`, seed `seed_split`.
      npz: `dir` is a .npz in the MedMNIST layout (see `npz.load_npz`); ids "train/000012".
      medmnist/<flag>: the official file, from `dir` or downloaded into it, MD5 checked.
      folder: `<dir>/{train,val,test}/<class>/<image>`; ids are relative paths. Files such as
        `<dir>/labels.csv` are not read: a set whose patients are known belongs to `csv`.
      csv: `dir` is a csv file, paths relative to its folder; columns named by
        `csv_path_column`, `csv_split_column`, `csv_label_column` and, where not "",
        `csv_patient_column`. No patient may be in two splits.

    `folder` and `csv` sets without a `val` split get one from `train`: `val_fraction` of it,
    stratified by class, whole patients where they are known, seeded by `seed_split`.

    Args:
      config: keys name, dir, val_fraction (0.15), bit_depth (16), csv_path_column ("path"),
        csv_split_column ("split"), csv_label_column ("label"), csv_patient_column (""),
        phantom (train, val, test, domain), seed_split (0).
      image_size: s, height and width of the images in pixels.
      progress: called as `progress(done, total, text)`.

    Raises:
      UserError: anything in the data or the configuration that the user has to mend.
    """
    _integer("model.image_size", image_size, 1, 2**14)
    name = str(config.get("name", ""))
    if name == "phantom":
        return _load_phantom(config, image_size)
    if name == "npz":
        path = _required_path(config, "the path of an .npz file")
        return _name_classes(load_npz(path, image_size, progress, classes_by_file_name(path)))
    if name.startswith("medmnist/"):
        flag = name.removeprefix("medmnist/")
        return load_medmnist(flag, str(config.get("dir") or ""), image_size, progress)
    if name == "folder":
        root = _required_path(config, "a folder with train/, val/ and test/")
        entries, notes = _list_folder(root), ()
        return _assemble(entries, notes, root, config, image_size, progress)
    if name == "csv":
        path = _required_path(config, "the path of a csv file")
        entries, notes = _list_csv(path, config)
        return _assemble(entries, notes, path, config, image_size, progress)
    hint = " (tfds is not supported yet)" if name.startswith("tfds") else ""
    raise UserError(f"unknown data.name '{name}'{hint}: choose from {', '.join(NAMES)}")


def _load_phantom(config: Mapping[str, Any], image_size: int) -> Dataset:
    # The generator's module is loaded by its users alone.
    from medtl_jax.data.phantom import make_phantom

    options = dict(config.get("phantom") or {})
    unknown = sorted(set(options) - {"train", "val", "test", "domain"})
    if unknown:
        raise UserError(f"unknown key data.phantom.{unknown[0]}: use train, val, test, domain")
    return make_phantom(image_size, **options, seed=_seed(config))


def _name_classes(dataset: Dataset) -> Dataset:
    """Returns the .npz set with a note on where its class names come from."""
    if classes_by_file_name(Path(dataset.spec.source)) is None:
        return dataset
    note = "class names are MedMNIST's, by the file's name; its MD5 was not checked"
    spec = dataclasses.replace(dataset.spec, notes=(*dataset.spec.notes, note))
    return dataclasses.replace(dataset, spec=spec)


def _list_folder(root: Path) -> list[_Entry]:
    """Returns the images of `<root>/<split>/<class>/`, sorted by split, class and file name."""
    if not root.is_dir():
        raise UserError(f"no such folder: {root} (data.dir)")
    for child in sorted(root.iterdir()):
        if child.name.startswith(".") or child.name in SPLITS:
            continue
        if child.is_dir():
            raise UserError(f"unexpected folder {child}: {root} may hold train, val and test only")
        if child.suffix.lower() in IMAGE_SUFFIXES:
            raise UserError(f"{child} lies outside the class folders: move it into one")
    found = {split: _class_folders(root / split) for split in SPLITS if (root / split).is_dir()}
    for split in ("train", "test"):
        if split not in found:
            raise UserError(f"no folder {root / split}: a set needs train/<class> and test/<class>")
    wanted = {folder.name for folder in found["train"]}
    for split, folders in found.items():
        difference = sorted(wanted ^ {folder.name for folder in folders})
        if difference:
            raise UserError(
                f"the class folders of {root / split} and {root / 'train'} differ: "
                f"{', '.join(difference)} in one of them only"
            )
    return [
        _Entry(path, path.relative_to(root).as_posix(), split, folder.name)
        for split, folders in found.items()
        for folder in folders
        for path in _class_images(folder)
    ]


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


def _class_images(folder: Path) -> list[Path]:
    images = [child for child in sorted(folder.iterdir()) if not _is_hidden(child)]
    for path in images:
        if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            raise UserError(
                f"{path} is not an image file ({' '.join(sorted(IMAGE_SUFFIXES))}): "
                "a class folder may hold images only"
            )
    if not images:
        raise UserError(f"class folder {folder} is empty: add images or delete the class")
    return images


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in _SYSTEM_FILES


def _list_csv(path: Path, config: Mapping[str, Any]) -> tuple[list[_Entry], tuple[str, ...]]:
    """Returns the rows of the csv file as entries, and notes."""
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
        entries.append(_Entry(path.parent / relative, relative, split, cells[columns[2]], patient))
    _check_rows(entries, path)
    notes = ()
    if not columns[3]:
        notes = ("no patient column (data.csv_patient_column): leakage of patients not checked",)
    return entries, notes


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


def _check_rows(entries: list[_Entry], path: Path) -> None:
    name, count = Counter(entry.id for entry in entries).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: '{name}' is listed {count} times; list each image once")
    splits = {entry.split for entry in entries}
    for split in ("train", "test"):
        if split not in splits:
            raise UserError(f"{path} has no rows of split '{split}'")
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


def _assemble(
    entries: list[_Entry],
    notes: tuple[str, ...],
    source: Path,
    config: Mapping[str, Any],
    image_size: int,
    progress: Progress | None,
) -> Dataset:
    """Returns the decoded set: names checked, `val` carved where it is missing, classes sorted."""
    bit_depth = _integer("data.bit_depth", config.get("bit_depth", 16), 8, 16)
    for entry in entries:
        if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", entry.id + entry.label):
            raise UserError(
                f"{source}: rename {entry.id!r}, it has a control or non-UTF-8 character"
            )
    train_labels = {entry.label for entry in entries if entry.split == "train"}
    classes = tuple(sorted({entry.label for entry in entries}, key=_class_order))
    for label in classes:
        if label not in train_labels:
            raise UserError(f"{source}: class '{label}' has no image in the split train")
    if len(classes) < 2:
        raise UserError(
            f"{source}: only one class ('{classes[0]}'); a classifier needs two or more"
        )
    if all(entry.split != "val" for entry in entries):
        entries, note = _carve_val(entries, config, source)
        notes += (note,)
    ordered = [entry for split in SPLITS for entry in entries if entry.split == split]
    images, decoding_notes = decode_many(
        [entry.path for entry in ordered], image_size, bit_depth, progress=progress
    )
    notes += _absent_classes(ordered, classes) + decoding_notes
    spec = DataSpec(source.name, "classify", classes, source=str(source), notes=notes)
    return Dataset(spec, _to_splits(ordered, images, classes))


def _to_splits(
    ordered: list[_Entry], images: np.ndarray, classes: tuple[str, ...]
) -> dict[str, Split]:
    """Returns the splits as views of `images`, whose rows are `ordered`."""
    index = {label: number for number, label in enumerate(classes)}
    splits, start = {}, 0
    for name in SPLITS:
        part = [entry for entry in ordered if entry.split == name]
        patients = None
        if part[0].patient is not None:
            patients = np.array([entry.patient for entry in part], dtype=str)
        splits[name] = Split(
            images=images[start : start + len(part)],
            labels=np.array([index[entry.label] for entry in part], np.int32),
            ids=np.array([entry.id for entry in part], dtype=str),
            patients=patients,
        )
        start += len(part)
    return splits


def _carve_val(
    entries: list[_Entry], config: Mapping[str, Any], source: Path
) -> tuple[list[_Entry], str]:
    """Returns the entries with a part of `train` moved to `val`, and a note about it."""
    fraction = config.get("val_fraction", 0.15)
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise UserError(f"data.val_fraction must lie between 0 and 1, not {fraction!r}")
    train = [number for number, entry in enumerate(entries) if entry.split == "train"]
    labels = [entries[number].label for number in train]
    patients = [entries[number].patient for number in train]
    grouped = patients[0] is not None
    try:
        chosen = carve(labels, patients if grouped else None, float(fraction), _seed(config))
    except ValueError as error:
        raise UserError(
            f"{source}: cannot make a val split from train ({one_line(error)}): "
            "add images, change data.val_fraction or provide val"
        ) from error
    moved = {train[index] for index in chosen}
    carved = [
        dataclasses.replace(entry, split="val") if number in moved else entry
        for number, entry in enumerate(entries)
    ]
    how = "stratified by class" + (", whole patients" if grouped else "")
    return carved, f"val: {len(moved)} of the {len(train)} train images, {how}"


def _absent_classes(entries: list[_Entry], classes: tuple[str, ...]) -> tuple[str, ...]:
    notes = []
    for split in ("val", "test"):
        present = {entry.label for entry in entries if entry.split == split}
        absent = [label for label in classes if label not in present]
        if absent:
            notes.append(f"{split} has no image of {', '.join(absent)}")
    return tuple(notes)


def _class_order(label: str) -> tuple[int, float, str]:
    """Sorting key: numbers by value, before names in code-point order."""
    number = re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", label)
    return (0, float(label), label) if number else (1, 0.0, label)


def _required_path(config: Mapping[str, Any], what: str) -> Path:
    text = str(config.get("dir") or "")
    if not text:
        raise UserError(f"data.dir is empty: set it to {what} for data.name={config['name']}")
    return Path(text).expanduser()


def _seed(config: Mapping[str, Any]) -> int:
    return _integer("data.seed_split", config.get("seed_split", 0), 0, 2**32 - 1)


def _integer(key: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"{key} must be an integer from {low} to {high}, not {value!r}")
    return value
