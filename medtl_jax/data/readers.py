"""One `Dataset` from `config.data`: the phantom, MedMNIST, .npz files, class folders, csv lists."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medtl_jax.data.catalog import (
    SPLITS,
    Dataset,
    DataSpec,
    Split,
    absent_classes,
    check_equal_classes,
)
from medtl_jax.data.images import Progress, decode_many
from medtl_jax.data.listing import Entry, list_csv, list_folder
from medtl_jax.data.medmnist import classes_by_file_name, load_medmnist
from medtl_jax.data.npz import load_npz
from medtl_jax.data.subset import TrainPlan, divide, reduce_train
from medtl_jax.errors import UserError
from medtl_jax.files import user_path

NAMES = ("phantom", "npz", "medmnist/<flag>", "folder", "csv")


def load_dataset(
    config: Mapping[str, Any],
    image_size: int,
    progress: Progress | None = None,
    *,
    classes: Sequence[str] | None = None,
    splits: Collection[str] = SPLITS,
) -> Dataset:
    """Returns the data set that `config` (the section `data`) names, decoded and resized.

    Images are uint8 `[n, s, s, c]` with one c for all splits; labels int32 `[n]`.

    Names:
      phantom: synthetic images, sizes and domain from `config.phantom`, seed `seed_split`.
      npz: `dir` is a .npz in the MedMNIST or Keras layout (see `npz.load_npz`); ids
        "train/000012", which an image moved to `val` keeps.
      medmnist/<flag>: the official file, from `dir` or downloaded into it, MD5 checked.
      folder: `<dir>/{train,val,test}/<class>/<image>`; ids are relative paths. Files such as
        `<dir>/labels.csv` are not read: a set whose patients are known belongs to `csv`.
      csv: `dir` is a csv file, paths relative to its folder; columns named by
        `csv_path_column`, `csv_split_column`, `csv_label_column` and, where not "",
        `csv_patient_column`. No patient may be in two splits.

    `per_class` takes that many images of each class from `train` (`subset.draw_per_class`), for
    training alone. Then `folder`, `csv` and `npz` sets without a `val` split get one from what
    was taken, where `val` is asked for: `val_fraction` of it, stratified by class, whole patients
    where they are known. Both are seeded by `seed_split`. Where a trained model is scored (see
    `classes`), `per_class` counts only for such a `val`: that is the training run's where
    `per_class`, `val_fraction` and `seed_split` are as they were there.

    Args:
      config: keys name, dir, per_class (0: all), val_fraction (0.15), seed_split (0),
        bit_depth (16), csv_path_column ("path"), csv_split_column ("split"), csv_label_column
        ("label"), csv_patient_column (""), phantom (train, val, test, domain).
      image_size: s, height and width of the images in pixels.
      progress: called as `progress(done, total, text)`.
      classes: names that a trained model knows, in its order: labels are looked up in them, and
        a class without images is a note. None takes the set's own classes, every one of which
        then needs images in `train`.
      splits: those of train, val and test that are needed; no other is decoded or returned.

    Raises:
      UserError: anything in the data or the configuration that the user has to mend.
      ValueError: `train` is not among `splits` and there are no `classes`.
    """
    _integer("model.image_size", image_size, 1, 2**14)
    splits = _check_splits(splits, classes)
    if classes is not None:
        classes = tuple(classes)
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise UserError(f"the model's classes ({', '.join(classes)}) are not two or more names")
    plan = TrainPlan(
        _integer("data.per_class", config.get("per_class", 0), 0, 10**6),
        config.get("val_fraction", 0.15),
        _integer("data.seed_split", config.get("seed_split", 0), 0, 2**32 - 1),
        training=classes is None,
    )
    name = str(config.get("name", ""))
    if name == "phantom":
        return _load_phantom(config, image_size, classes, splits, plan)
    if name == "npz":
        path = _required_path(config, "the path of an .npz file")
        return _load_named_npz(path, image_size, progress, classes, splits, plan)
    if name.startswith("medmnist/"):
        flag, folder = name.removeprefix("medmnist/"), str(config.get("dir") or "")
        whole = load_medmnist(flag, folder, image_size, progress, classes=classes, splits=splits)
        return reduce_train(whole, plan)
    if name in ("folder", "csv"):
        return _load_listed(config, image_size, progress, classes, splits, plan)
    hint = " (tfds is not supported yet)" if name.startswith("tfds") else ""
    raise UserError(f"unknown data.name '{name}'{hint}: choose from {', '.join(NAMES)}")


def _check_splits(splits: Collection[str], classes: Sequence[str] | None) -> tuple[str, ...]:
    """Returns `splits` in their usual order."""
    unknown = [name for name in splits if name not in SPLITS]
    if unknown or not splits:
        raise UserError(
            f"no split '{', '.join(unknown)}': choose one or more of {', '.join(SPLITS)}"
        )
    if classes is None and "train" not in splits:
        raise ValueError("without classes, the split train is needed: it says what they are")
    return tuple(name for name in SPLITS if name in splits)


def _load_phantom(
    config: Mapping[str, Any],
    image_size: int,
    classes: tuple[str, ...] | None,
    splits: tuple[str, ...],
    plan: TrainPlan,
) -> Dataset:
    # The generator's module is loaded by its users alone.
    from medtl_jax.data import phantom

    options = dict(config.get("phantom") or {})
    unknown = sorted(set(options) - {"train", "val", "test", "domain"})
    if unknown:
        raise UserError(f"unknown key data.phantom.{unknown[0]}: use train, val, test, domain")
    check_equal_classes("the phantom", phantom.CLASSES, classes)
    whole = phantom.make_phantom(image_size, **options, seed=plan.seed, splits=splits)
    return reduce_train(whole, plan)


def _load_named_npz(
    path: Path,
    image_size: int,
    progress: Progress | None,
    classes: tuple[str, ...] | None,
    splits: tuple[str, ...],
    plan: TrainPlan,
) -> Dataset:
    """Returns the .npz set with a note on where its class names come from."""
    named = classes_by_file_name(path)
    dataset = load_npz(
        path,
        image_size,
        progress,
        classes or named,
        splits=splits,
        complete=classes is None,
        plan=plan,
    )
    if named is None or named == classes:
        return dataset
    note = "class names are MedMNIST's, by the file's name; its MD5 was not checked"
    if classes is not None:
        note = f"class names are the model's; by the file's name they are {', '.join(named)}"
    spec = dataclasses.replace(dataset.spec, notes=(*dataset.spec.notes, note))
    return dataclasses.replace(dataset, spec=spec)


def _load_listed(
    config: Mapping[str, Any],
    image_size: int,
    progress: Progress | None,
    classes: tuple[str, ...] | None,
    splits: tuple[str, ...],
    plan: TrainPlan,
) -> Dataset:
    """Returns the decoded set of class folders or of a csv list."""
    bit_depth = _integer("data.bit_depth", config.get("bit_depth", 16), 8, 16)
    if config["name"] == "folder":
        source = _required_path(config, "a folder with train/, val/ and test/")
        entries, notes = list_folder(source, splits, classes)
    else:
        source = _required_path(config, "the path of a csv file")
        entries, notes = list_csv(source, config, splits)
    classes = _check_entries(entries, classes, source)
    entries, divided = _divide_train(entries, plan, splits, source)
    ordered = [entry for split in splits for entry in entries if entry.split == split]
    for split in splits:
        if all(entry.split != split for entry in ordered):
            raise UserError(f"{source}: the split {split} has no images")
    images, decoding = decode_many(
        [entry.path for entry in ordered], image_size, bit_depth, progress=progress
    )
    parts = _to_splits(ordered, images, classes, splits)
    notes += divided + absent_classes(classes, parts) + decoding
    spec = DataSpec(source.name, "classify", classes, source=str(source), notes=notes)
    return Dataset(spec, parts)


def _check_entries(
    entries: list[Entry], classes: tuple[str, ...] | None, source: Path
) -> tuple[str, ...]:
    """Returns the classes, after checking every image's name and label."""
    for entry in entries:
        if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", entry.id + entry.label):
            raise UserError(
                f"{source}: rename {entry.id!r}, it has a control or non-UTF-8 character"
            )
    if classes is None:
        return _own_classes(entries, source)
    _check_labels(entries, classes, source)
    return classes


def _own_classes(entries: list[Entry], source: Path) -> tuple[str, ...]:
    """Returns the labels, sorted; UserError for one without a training image, or one alone."""
    train_labels = {entry.label for entry in entries if entry.split == "train"}
    classes = tuple(sorted({entry.label for entry in entries}, key=_class_order))
    for label in classes:
        if label not in train_labels:
            raise UserError(f"{source}: class '{label}' has no image in the split train")
    if len(classes) < 2:
        raise UserError(
            f"{source}: only one class ('{classes[0]}'); a classifier needs two or more"
        )
    return classes


def _check_labels(entries: list[Entry], classes: tuple[str, ...], source: Path) -> None:
    for entry in entries:
        if entry.label not in classes:
            raise UserError(
                f"{source}: {entry.id} has the label '{entry.label}', which the model does not "
                f"know; its classes are {', '.join(classes)}"
            )


def _divide_train(
    entries: list[Entry], plan: TrainPlan, splits: tuple[str, ...], source: Path
) -> tuple[list[Entry], tuple[str, ...]]:
    """Returns the entries that `plan` keeps, a carved `val` among them, and notes."""
    train = [entry for entry in entries if entry.split == "train"]
    if not train:
        return entries, ()
    division = divide(
        [entry.label for entry in train],
        [entry.id for entry in train],
        None if train[0].patient is None else [entry.patient for entry in train],
        plan,
        splits=splits,
        has_val=any(entry.split == "val" for entry in entries),
        source=str(source),
    )
    kept = [entry for entry in entries if entry.split != "train"]
    kept += [train[row] for row in division.train]
    kept += [dataclasses.replace(train[row], split="val") for row in division.val]
    return kept, division.notes


def _to_splits(
    ordered: list[Entry], images: np.ndarray, classes: tuple[str, ...], splits: tuple[str, ...]
) -> dict[str, Split]:
    """Returns the splits as views of `images`, whose rows are `ordered`."""
    index = {label: number for number, label in enumerate(classes)}
    parts, start = {}, 0
    for name in splits:
        part = [entry for entry in ordered if entry.split == name]
        patients = None
        if part[0].patient is not None:
            patients = np.array([entry.patient for entry in part], dtype=str)
        parts[name] = Split(
            images=images[start : start + len(part)],
            labels=np.array([index[entry.label] for entry in part], np.int32),
            ids=np.array([entry.id for entry in part], dtype=str),
            patients=patients,
        )
        start += len(part)
    return parts


def _class_order(label: str) -> tuple[int, float, str]:
    """Sorting key: numbers by value, before names in code-point order."""
    number = re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", label)
    return (0, float(label), label) if number else (1, 0.0, label)


def _required_path(config: Mapping[str, Any], what: str) -> Path:
    text = str(config.get("dir") or "")
    if not text:
        raise UserError(f"data.dir is empty: set it to {what} for data.name={config['name']}")
    return user_path(text, "data.dir")


def _integer(key: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"{key} must be an integer from {low} to {high}, not {value!r}")
    return value
