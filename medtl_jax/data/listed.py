"""Sets of image files, in class folders or listed in a csv, decoded into splits."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medtl_jax.data.carve import HeldOut, draw_test
from medtl_jax.data.catalog import Array, Dataset, DataSpec, Split, absent_classes
from medtl_jax.data.csvlist import check_rows, choose_splits, columns_of, list_csv
from medtl_jax.data.images import Progress, one_line
from medtl_jax.data.listing import Entry, expand, list_folder, name_patients
from medtl_jax.data.masks import resize_note, upright_sizes
from medtl_jax.data.medical import Reading, check_channels
from medtl_jax.data.planes import ImageSource
from medtl_jax.data.strata import CLASS_TASKS, strata, way
from medtl_jax.data.streams import open_images, open_masks, select
from medtl_jax.data.subset import TrainPlan, divide
from medtl_jax.data.targets import (
    BACKGROUND_FOREGROUND,
    check_known,
    check_no_measurement,
    check_still_known,
    check_train,
    read_findings,
    read_labels,
    read_numbers,
)
from medtl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is asked for of a set of files.

    Attributes:
      image_size: height and width in pixels.
      task: one of `catalog.TASKS`, "" as the data say.
      model: classes, findings or numbers that a trained model knows; None in training.
      named: `data.classes`, None where they are not named.
      splits: in their usual order.
      plan: what to make of the training images.
      bit_depth: bits in use in 16-bit files.
      reading: how DICOM and NIfTI files are read.
      patients: finds the patient in the name of a file, None where names do not say them.
      grey: whether colour images become grey.
      limit_bytes: most bytes of decoded images to hold in memory, and as many of masks.
      progress: called as `progress(done, total, text)`.
    """

    image_size: int
    task: str
    model: tuple[str, ...] | None
    named: tuple[str, ...] | None
    splits: tuple[str, ...]
    plan: TrainPlan
    bit_depth: int
    reading: Reading
    patients: re.Pattern[str] | None
    grey: bool
    limit_bytes: float
    progress: Progress | None

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Those that are known before the data are read."""
        return self.model or self.named

    @property
    def whose(self) -> str:
        return "the model's classes" if self.model else "data.classes"


def load_folder(source: Path, wanted: Wanted) -> Dataset:
    """Returns the set of the class folders `<source>/<split>/<class>/`.

    Raises:
      UserError: anything in the folder that the user has to mend; a task without classes of
        images.
    """
    task = wanted.task or "classify"
    if task not in CLASS_TASKS:
        raise UserError(
            f"task={task}: data.name=folder says the class of each image only; list the images "
            "in a csv and use data.name=csv"
        )
    entries, notes = list_folder(source, wanted.splits, wanted.model)
    entries, patients = _expand(entries, wanted, source)
    return assemble(entries, task, (), wanted, source, notes + patients)


def _expand(
    entries: list[Entry], wanted: Wanted, source: Path
) -> tuple[list[Entry], tuple[str, ...]]:
    """Returns an entry for each image, and notes; UserError for an image or patient that is twice
    where it may not be.
    """
    check_channels(wanted.reading, wanted.grey)
    entries, notes = expand(
        name_patients(entries, wanted.patients, source), wanted.reading, wanted.progress
    )
    check_rows(entries, source)
    return entries, notes


def load_csv(source: Path, config: Mapping[str, Any], wanted: Wanted, held_out: HeldOut) -> Dataset:
    """Returns the set that a csv file lists; `config` (the section `data`) names its columns.

    Where it names no split column, `held_out` says which images are for test, and the rest are
    `train`, from which `val` is carved.

    Raises:
      UserError: anything in the file that the user has to mend.
    """
    columns = columns_of(config, wanted.task, wanted.model)
    entries, notes = _expand(list_csv(source, columns), wanted, source)
    chosen_by = " and ".join(f"{column}={value}" for column, value in columns.where)
    notes += (f"only rows with {chosen_by}",) if chosen_by else ()
    if not wanted.task and columns.task == "classify" and wanted.classes is None:
        labels = [entry.cells[0] for entry in entries]
        check_no_measurement(labels, columns.labels[0], str(source))
    if not columns.split:
        entries, drawn = _split_table(
            entries, columns.task, columns.labels, wanted, held_out, source
        )
        notes += drawn
    way_out = "set data.csv_split_column='' to draw it"
    entries, chosen = choose_splits(entries, wanted.splits, source, way_out)
    notes += chosen
    if entries[0].patient is None:
        notes += ("no patient column (data.csv_patient_column): leakage of patients not checked",)
    return assemble(entries, columns.task, columns.labels, wanted, source, notes)


def _split_table(
    entries: list[Entry],
    task: str,
    names: tuple[str, ...],
    wanted: Wanted,
    held_out: HeldOut,
    source: Path,
) -> tuple[list[Entry], tuple[str, ...]]:
    """Returns the entries, each in `train` or `test`, and a note."""
    classes, target = _read_target(entries, task, names, wanted, source)
    labels, patients = strata(task, target, classes, len(entries)), _patients(entries)
    try:
        rows = set(draw_test(labels, patients, held_out).tolist())
    except ValueError as error:
        keys = "data.folds" if held_out.folds else "data.test_fraction"
        raise UserError(
            f"{source}: cannot take a test split from {len(entries)} images ({one_line(error)}): "
            f"change {keys} or name data.csv_split_column"
        ) from error
    part = f"fold {held_out.fold} of {held_out.folds}, " if held_out.folds else ""
    how = way(task) + (", whole patients" if patients else "")
    note = f"test: {part}{len(rows)} of the {len(entries)} images, {how}, seed {held_out.seed}"
    split = ["test" if row in rows else "train" for row in range(len(entries))]
    pairs = zip(entries, split, strict=True)
    return [dataclasses.replace(entry, split=name) for entry, name in pairs], (note,)


def _read_target(
    entries: list[Entry], task: str, names: tuple[str, ...], wanted: Wanted, source: Path
) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Returns the classes (or findings, numbers) and what is said of each image; None of masks."""
    if task == "segment":
        return wanted.classes or BACKGROUND_FOREGROUND, None
    ids, place = [entry.id for entry in entries], str(source)
    if task in CLASS_TASKS:
        labels = [entry.cells[0] for entry in entries]
        return read_labels(task, labels, ids, wanted.classes, wanted.whose, place)
    if wanted.named not in (None, names):
        raise UserError(
            f"data.classes ({', '.join(wanted.named)}) are not the columns of "
            f"data.csv_label_column ({', '.join(names)}): leave it empty"
        )
    read = read_findings if task == "multilabel" else read_numbers
    return names, read([entry.cells for entry in entries], ids, names, place)


def assemble(
    entries: list[Entry],
    task: str,
    names: tuple[str, ...],
    wanted: Wanted,
    source: Path,
    notes: tuple[str, ...],
) -> Dataset:
    """Returns the set of the entries, checked, divided by `wanted.plan` and decoded.

    Args:
      entries: the images, in their order.
      task: one of `catalog.TASKS`.
      names: of the findings or numbers that the entries' cells hold; () for other tasks.
      wanted: what is asked for.
      source: the set, for messages and the specification.
      notes: about how the entries were found.

    Raises:
      UserError: anything in the data that the user has to mend.
    """
    _check_names(entries, source)
    classes, target = _read_target(entries, task, names, wanted, source)
    training = wanted.model is None
    if target is not None and training:
        check_known(task, target, classes, str(source))
        train = [row for row, entry in enumerate(entries) if entry.split == "train"]
        check_train(task, target[train], classes, str(source))
    rows, divided = _divide_train(
        entries, strata(task, target, classes, len(entries)), task, wanted, source
    )
    _check_divided(rows, task, target, classes, wanted, source)
    order = np.concatenate([rows[split] for split in wanted.splits])
    ordered = [entries[row] for row in order]
    masks = target is None
    if masks:
        target, extra, resized = _open_masks(ordered, len(classes), wanted)
        divided += resized
    else:
        target, extra = target[order], {}
    images, decoding = open_images(
        [entry.path for entry in ordered],
        wanted.image_size,
        wanted.bit_depth,
        channels=1 if wanted.grey else None,
        limit_bytes=wanted.limit_bytes,
        progress=wanted.progress,
    )
    lengths = {split: len(rows[split]) for split in wanted.splits}
    parts = _to_splits(ordered, images, target, extra, lengths)
    if masks and training:
        part = f" (data.train_fraction={wanted.plan.train_fraction})" if wanted.plan.thins else ""
        check_train(task, parts["train"].target, classes, f"{source}{part}")
    notes += divided + absent_classes(classes, parts, task) + decoding
    return Dataset(DataSpec(source.name, task, classes, source=str(source), notes=notes), parts)


def _check_names(entries: list[Entry], source: Path) -> None:
    for entry in entries:
        if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", "".join((entry.id, *entry.cells))):
            raise UserError(
                f"{source}: rename {entry.id!r}, it has a control or non-UTF-8 character"
            )


def _divide_train(
    entries: list[Entry], labels: list[str], task: str, wanted: Wanted, source: Path
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Returns the rows of each split, those of `train` by the plan, and notes."""
    homes = np.array([entry.split for entry in entries], dtype=str)
    rows = {split: np.flatnonzero(homes == split) for split in ("train", "val", "test")}
    train = rows["train"]
    if not len(train):
        return rows, ()
    division = divide(
        [labels[row] for row in train],
        [entries[row].id for row in train],
        _patients([entries[row] for row in train]),
        wanted.plan,
        splits=wanted.splits,
        has_val=len(rows["val"]) > 0,
        source=str(source),
        task=task,
    )
    val = np.concatenate([rows["val"], train[division.val]])
    return {**rows, "train": train[division.train], "val": val}, division.notes


def _check_divided(
    rows: Mapping[str, np.ndarray],
    task: str,
    target: np.ndarray | None,
    classes: tuple[str, ...],
    wanted: Wanted,
    source: Path,
) -> None:
    """Raises UserError unless each split has images, and enough is known of them."""
    for split in wanted.splits:
        if not len(rows[split]):
            raise UserError(f"{source}: the split {split} has no images")
    if target is None:
        return
    if wanted.model is None:
        left, fraction = target[rows["train"]], wanted.plan.train_fraction
        check_still_known(task, left, classes, str(source), fraction)
    for split in wanted.splits:
        check_known(task, target[rows[split]], classes, str(source), split)


def _patients(entries: list[Entry]) -> list[str] | None:
    known = entries[0].patient is not None
    return [entry.patient for entry in entries] if known else None


def _open_masks(
    ordered: list[Entry], count: int, wanted: Wanted
) -> tuple[Array, dict[str, Array], tuple[str, ...]]:
    """Returns the masks of `ordered`, those of a second observer as `mask2`, if any, and notes."""
    sizes = upright_sizes([entry.path for entry in ordered])
    notes = resize_note(sizes, wanted.image_size)

    def read(paths: list[ImageSource]) -> Array:
        return open_masks(
            paths,
            wanted.image_size,
            count,
            sizes,
            limit_bytes=wanted.limit_bytes,
            progress=wanted.progress,
        )

    masks = read([entry.mask for entry in ordered])
    if ordered[0].mask2 is None:
        return masks, {}, notes
    return masks, {"mask2": read([entry.mask2 for entry in ordered])}, notes


def _to_splits(
    ordered: list[Entry],
    images: Array,
    target: Array,
    extra: dict[str, Array],
    lengths: dict[str, int],
) -> dict[str, Split]:
    """Returns the splits, consecutive parts of the arrays, whose rows are `ordered`."""
    parts, start = {}, 0
    for name, length in lengths.items():
        rows = slice(start, start + length)
        entries = ordered[rows]
        patients = _patients(entries)
        parts[name] = Split(
            images=select(images, rows),
            target=select(target, rows),
            ids=np.array([entry.id for entry in entries], dtype=str),
            patients=None if patients is None else np.array(patients, dtype=str),
            extra={key: select(values, rows) for key, values in extra.items()},
        )
        start += length
    return parts
