"""Images listed in a csv file: which columns say what, and every row of it checked."""

import csv
import dataclasses
import io
import re
import reprlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from medtl_jax.data.catalog import SPLITS, check_equal_classes
from medtl_jax.data.images import one_line
from medtl_jax.data.listing import Entry
from medtl_jax.data.strata import CLASS_TASKS
from medtl_jax.data.subset import splits_to_read, whole_train
from medtl_jax.data.targets import is_unknown
from medtl_jax.errors import UserError

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclasses.dataclass(frozen=True)
class Columns:
    """What the columns of a csv list are called, and how a cell becomes a path.

    Attributes:
      task: one of `catalog.TASKS`.
      where: columns with the value that the rows have which are read; () for all rows.
      path, split, patient, mask: names; "" where there is none.
      labels: names of the columns of the class, of the findings or of the numbers.
      path_format, mask_format, mask2_format: paths with one {} for the cell; the last one ""
        where no second observer drew masks.
    """

    task: str
    path: str
    split: str
    labels: tuple[str, ...]
    patient: str
    mask: str
    path_format: str
    mask_format: str
    mask2_format: str
    where: tuple[tuple[str, str], ...] = ()

    def names(self) -> tuple[str, ...]:
        """Returns the columns that are read, each once."""
        chosen_by = (column for column, _ in self.where)
        found = (self.path, self.split, *self.labels, self.patient, self.mask, *chosen_by)
        return tuple(dict.fromkeys(name for name in found if name))


def columns_of(
    config: Mapping[str, Any], task: str, classes: tuple[str, ...] | None = None
) -> Columns:
    """Returns the columns that `config` (the section `data`) names for `task`.

    Without a task, a mask column means `segment`, several label columns `multilabel`, and one
    `classify`. The columns of findings and numbers come in the order of `classes`, a trained
    model's, where it is given.

    Raises:
      UserError: a column without a name or with a needless one, other columns than the model's,
        or a format without {}.
    """

    def text(key: str, default: str = "") -> str:
        return str(config.get(key, default)).strip()

    mask, labels = text("csv_mask_column"), split_names(text("csv_label_column", "label"))
    task = task or ("segment" if mask else "multilabel" if len(labels) > 1 else "classify")
    _check_task(task, labels, mask, text("csv_mask2_format"))
    if classes and task in ("multilabel", "regress"):
        if set(classes) != set(labels):
            check_equal_classes("data.csv_label_column", labels, classes)
        labels = classes
    columns = Columns(
        task,
        text("csv_path_column", "path"),
        text("csv_split_column", "split"),
        () if task == "segment" else labels,
        text("csv_patient_column"),
        mask,
        text("csv_path_format", "{}"),
        text("csv_mask_format", "{}"),
        text("csv_mask2_format"),
        split_conditions(text("csv_where")),
    )
    if not columns.path:
        raise UserError("data.csv_path_column is empty: name the column with the images' paths")
    for key in ("csv_path_format", "csv_mask_format", "csv_mask2_format"):
        value = getattr(columns, key.removeprefix("csv_"))
        if value.count("{}") != 1 and (value or key != "csv_mask2_format"):
            raise UserError(f"data.{key}={value!r} needs one {{}}, the place of the cell")
    return columns


def split_names(text: str, key: str = "data.csv_label_column") -> tuple[str, ...]:
    """Returns the comma-separated names in `text`, in order; UserError for one that is twice.

    >>> split_names("edema, mass")
    ('edema', 'mass')
    """
    names = tuple(name.strip() for name in text.split(",")) if text.strip() else ()
    twice = [name for name, count in Counter(names).items() if count > 1]
    if "" in names or twice:
        fault = f"names '{twice[0]}' twice" if twice and twice[0] else "has an empty name"
        raise UserError(f"{key}={text!r} {fault}: separate different names by commas")
    return names


def split_conditions(text: str) -> tuple[tuple[str, str], ...]:
    """Returns the pairs in `text`, as in `column=value, column=value`; UserError for other text.

    >>> split_conditions("scanner=b, view=PA")
    (('scanner', 'b'), ('view', 'PA'))
    """
    pairs = tuple(part.partition("=") for part in text.split(",")) if text.strip() else ()
    conditions = tuple((column.strip(), value.strip()) for column, _, value in pairs)
    if not all(column and value for column, value in conditions):
        raise UserError(
            f"data.csv_where={text!r} must be column=value, several of them separated by commas"
        )
    return conditions


def _check_task(task: str, labels: tuple[str, ...], mask: str, mask2_format: str) -> None:
    if task == "segment":
        if not mask:
            raise UserError("task=segment needs data.csv_mask_column, the column with the masks")
        return
    if mask or mask2_format:
        key = "csv_mask_column" if mask else "csv_mask2_format"
        raise UserError(f"data.{key} is for task=segment, not {task}: leave it empty")
    if not labels:
        raise UserError("data.csv_label_column is empty: name the column with the labels")
    if task in CLASS_TASKS and len(labels) > 1:
        raise UserError(
            f"task={task} takes one data.csv_label_column, not {len(labels)} "
            f"({', '.join(labels)}): choose one, or task=multilabel or regress"
        )


def list_csv(path: Path, columns: Columns) -> list[Entry]:
    """Returns the rows of the file that are asked for, in its order; sorted by id where it has no
    split column.

    Raises:
      UserError: a file, header or row that cannot be used, an image listed twice, or a patient in
        two splits.
    """
    header, rows = _read_table(path, columns.names())
    where = {column: header.index(column) for column in columns.names()}
    entries = []
    for line, row in _chosen(rows, where, columns, path):
        cells = {column: row[index] for column, index in where.items()}
        entries.append(_entry(cells, columns, path, f"{path}, line {line}"))
    check_rows(entries, path)
    # A drawn split is then that of the images, whatever the order in which they are listed.
    return entries if columns.split else sorted(entries, key=lambda entry: entry.id)


def _chosen(
    rows: list[tuple[int, list[str]]], where: Mapping[str, int], columns: Columns, path: Path
) -> list[tuple[int, list[str]]]:
    """Returns the rows that meet `columns.where`; UserError where none is left by a condition."""
    for column, value in columns.where:
        kept = [(line, row) for line, row in rows if row[where[column]] == value]
        if not kept:
            found = Counter(row[where[column]] for _, row in rows).most_common(5)
            shown = ", ".join(reprlib.repr(name) for name, _ in found)
            raise UserError(
                f"{path}: no row has '{column}' = '{value}' (data.csv_where); there are {shown}"
            )
        rows = kept
    return rows


def choose_splits(
    entries: list[Entry], splits: Collection[str], path: Path, way_out: str
) -> tuple[list[Entry], tuple[str, ...]]:
    """Returns the entries of `splits`, of train for an absent val, and notes.

    Args:
      entries: of all splits.
      splits: those that are asked for.
      path: the set, for messages.
      way_out: what to do where there is no test, for a message.

    Raises:
      UserError: a split without entries.
    """
    present = {entry.split for entry in entries}
    needed = splits_to_read(splits, present)
    for split in needed:
        if split not in present:
            advice = f": add some, or {way_out}" if split == "test" else ""
            raise UserError(f"{path} has no rows of split '{split}'{advice}")
    return [entry for entry in entries if entry.split in needed], whole_train(splits, present)


def _entry(cells: Mapping[str, str], columns: Columns, path: Path, place: str) -> Entry:
    may_be_empty = columns.labels if columns.task not in CLASS_TASKS else ()
    named = {columns.patient, *columns.labels}
    for column, cell in cells.items():
        if _CONTROL.search(cell):
            raise UserError(f"{place}: rename {cell!r} ('{column}'), it has a control character")
        if column in may_be_empty:
            continue
        if not cell:
            raise UserError(f"{place}: column '{column}' is empty")
        if column in named and is_unknown(cell):
            raise UserError(
                f"{place}: column '{column}' has '{cell}', which is no name: fill it in, or leave "
                "the row out"
            )
    split = cells[columns.split] if columns.split else ""
    if columns.split and split not in SPLITS:
        raise UserError(f"{place}: split '{split}' is not train, val or test")

    def locate(column: str, pattern: str) -> str:
        return _relative_path(pattern.replace("{}", cells[column]), place)

    relative = locate(columns.path, columns.path_format)
    mask = mask2 = None
    if columns.mask:
        mask = path.parent / locate(columns.mask, columns.mask_format)
    if columns.mask and columns.mask2_format:
        mask2 = path.parent / locate(columns.mask, columns.mask2_format)
    return Entry(
        path.parent / relative,
        relative,
        split,
        tuple(cells[column] for column in columns.labels),
        cells[columns.patient] if columns.patient else None,
        mask,
        mask2,
    )


def _read_table(path: Path, wanted: Sequence[str]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Returns the header and `(line number, cells)` of each row; blank lines are left out."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it as 'CSV UTF-8'") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): data.dir must be a csv") from error
    (_, names), *rows = _parse(text, _delimiter(text, wanted), path)
    for name in names:
        if _CONTROL.search(name):
            raise UserError(f"{path}: rename the column {name!r}, it has a control character")
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


class SharedPatientsError(UserError):
    """Patients of the set `path` are in more than one split; `patients` names them all."""

    def __init__(self, path: Path, patients: Sequence[str]):
        super().__init__(
            f"{path}: {len(patients)} patients are in more than one split (first: "
            f"{', '.join(patients[:3])}); put all images of a patient into one split"
        )
        self.patients = tuple(patients)


def check_rows(entries: list[Entry], path: Path) -> None:
    """Raises UserError where an id occurs twice or a patient is in two splits."""
    for name, count in Counter(entry.id for entry in entries).most_common(1):
        if count > 1:
            raise UserError(f"{path}: '{name}' is listed {count} times; list each image once")
    homes: dict[str, set[str]] = {}
    for entry in entries:
        if entry.patient is not None:
            homes.setdefault(entry.patient, set()).add(entry.split)
    leaks = sorted(patient for patient, found in homes.items() if len(found) > 1)
    if leaks:
        raise SharedPatientsError(path, leaks)
