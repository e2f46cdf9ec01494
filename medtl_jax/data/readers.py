"""One `Dataset` from `config.data`: the phantom, MedMNIST, .npz files, folders, csv lists, TFDS."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from medtl_jax.data.carve import HeldOut
from medtl_jax.data.catalog import SPLITS, TASKS, Dataset, check_equal_classes
from medtl_jax.data.csvlist import split_names
from medtl_jax.data.images import Progress, to_grey
from medtl_jax.data.listed import Wanted, load_csv, load_folder
from medtl_jax.data.listing import patient_pattern
from medtl_jax.data.medical import reading_of
from medtl_jax.data.medmnist import load_medmnist, local_file, names_by_file_name
from medtl_jax.data.npz import load_npz
from medtl_jax.data.subset import TrainPlan, reduce_train
from medtl_jax.data.tfds_files import find_folder
from medtl_jax.errors import UserError
from medtl_jax.files import user_path

NAMES = ("phantom", "npz", "medmnist/<flag>", "folder", "csv", "tfds/<builder>")
_GIB = 2**30


def load_dataset(
    config: Mapping[str, Any],
    image_size: int,
    progress: Progress | None = None,
    *,
    task: str = "",
    classes: Sequence[str] | None = None,
    splits: Collection[str] = SPLITS,
    grey: bool = False,
) -> Dataset:
    """Returns the data set that `config` (the section `data`) names, resized.

    Images are uint8 `[n, s, s, c]` with one c for all splits; targets as in `catalog.Split`. Sets
    of files that are larger than `cache_gb` are `streams.Streamed` instead of arrays in memory.

    Names:
      phantom: synthetic images, sizes and domain from `config.phantom`, seed `seed_split`; its
        tasks are in `phantom_tasks`.
      npz: `dir` is a .npz in the MedMNIST or Keras layout (see `npz.load_npz`); ids
        "train/000012", which an image moved to `val` keeps.
      medmnist/<flag>: the official file, from `dir` or downloaded into it, MD5 checked.
      folder: `<dir>/{train,val,test}/<class>/<image>`; ids are relative paths. Files such as
        `<dir>/labels.csv` are not read: a set whose patients are known belongs to `csv`.
      csv: `dir` is a csv file, paths relative to its folder; the keys `csv_*` name its columns
        (see `csvlist.Columns`). No patient may be in two splits. Without a split column, test
        is a part of the table drawn by `test_fraction`, or by `folds` and `fold`.
        In both, a DICOM or NIfTI file stands for all of its images, and a folder of DICOM files
        for a series (see `medical`); without a patient column the files say the patients.
      tfds/<builder>: prepared in `dir` (see `tfds.load_tfds`).

    `per_class` takes that many images of each class from `train` (`subset.draw_per_class`), for
    training alone. Then `folder`, `csv`, `npz` and `tfds` sets without a `val` split get one from
    what was taken, where `val` is asked for: `val_fraction` of it, stratified (see `strata`),
    whole patients where they are known, seeded by `seed_split`. Of what is then left,
    `train_fraction` is drawn (`subset.draw_points`), stratified in the same way, for training
    alone; `val` and `test` stay whole. Both draws are seeded by `seed_draw`, and only one of them
    may be asked for. Where a trained model is scored (see `classes`), `train_fraction` counts for
    nothing, and `per_class` only for such a `val`: that is the training run's where `per_class`,
    `seed_draw`, `val_fraction` and `seed_split` are as they were there.

    Args:
      config: keys name, dir, classes (""), per_class (0: all), train_fraction (1.0), seed_draw
        (0), val_fraction (0.15), test_fraction (0.2), folds (0), fold (0), seed_split (0),
        bit_depth (16), window (""), plane ("axial"), slices (1), dicom_patient ("PatientID"),
        patient_pattern (""), cache_gb (4.0), csv_*, phantom (train, val, test, domain).
      image_size: s, height and width of the images in pixels.
      progress: called as `progress(done, total, text)`.
      task: one of `catalog.TASKS`; "" as the data say.
      classes: names that a trained model knows, in its order: labels are looked up in them, and
        a class without images is a note. None takes the set's own classes, every one of which
        then needs images in `train` (a finding or a number: known values).
      splits: those of train, val and test that are needed; no other is decoded or returned.
      grey: whether colour images become grey (ITU-R 601 luma), for a model of grey ones.

    Raises:
      UserError: anything in the data or the configuration that the user has to mend.
      ValueError: `train` is not among `splits` and there are no `classes`.
    """
    _integer("model.image_size", image_size, 1, 2**14)
    if task not in ("", *TASKS):
        raise UserError(f"unknown task '{task}': choose from {', '.join(TASKS)}, or leave it empty")
    splits = _check_splits(splits, classes)
    model, named = _check_classes(config, task, classes)
    wanted = Wanted(
        image_size=image_size,
        task=task,
        model=model,
        named=named,
        splits=splits,
        plan=_train_plan(config, training=model is None),
        bit_depth=_integer("data.bit_depth", config.get("bit_depth", 16), 8, 16),
        reading=reading_of(config),
        patients=patient_pattern(config),
        grey=grey,
        limit_bytes=_GIB * _number("data.cache_gb", config.get("cache_gb", 4.0)),
        progress=progress,
    )
    dataset = _load(config, wanted)
    return _to_grey(dataset) if grey else dataset


def locate(config: Mapping[str, Any]) -> Path | None:
    """Returns the file or folder that `load_dataset` reads for `config`; None for the phantom.

    Two names of one set, such as a TFDS set with and without its version, have one place. It is
    absolute, without symbolic links, and need not exist.

    Raises:
      UserError: `config.dir` is no path, or no such TFDS set is prepared.
      ValueError, OSError, RuntimeError: the path cannot be one of this system.
    """
    name, text = str(config.get("name", "")), str(config.get("dir") or "")
    if name == "phantom":
        return None
    path = user_path(text, "data.dir")
    if name.startswith("medmnist/"):
        path = local_file(name.removeprefix("medmnist/"), text)
    if name.startswith("tfds/"):
        path = find_folder(name.removeprefix("tfds/"), path)
    return path.resolve()


def _load(config: Mapping[str, Any], wanted: Wanted) -> Dataset:
    """Returns the set by the kind of it that `config.name` says."""
    name = str(config.get("name", ""))
    held_out = _held_out(config)
    if name == "phantom":
        return _load_phantom(config, wanted)
    if name == "npz":
        return _load_named_npz(_required_path(config, "the path of an .npz file"), wanted)
    if name.startswith("medmnist/"):
        whole = load_medmnist(
            name.removeprefix("medmnist/"),
            str(config.get("dir") or ""),
            wanted.image_size,
            wanted.progress,
            task=wanted.task,
            classes=wanted.model,
            splits=wanted.splits,
        )
        _check_named(f"medmnist/{name.removeprefix('medmnist/')}", whole.spec.classes, wanted)
        return reduce_train(whole, wanted.plan)
    if name == "folder":
        return load_folder(_required_path(config, "a folder with train/, val/ and test/"), wanted)
    if name == "csv":
        return load_csv(_required_path(config, "the path of a csv file"), config, wanted, held_out)
    if name.startswith("tfds/"):
        # TFDS takes seconds to load: its users alone pay for it.
        from medtl_jax.data.tfds import load_tfds

        folder = _required_path(config, "TFDS's data_dir, where the set is prepared")
        return load_tfds(name.removeprefix("tfds/"), folder, wanted)
    raise UserError(f"unknown data.name '{name}': choose from {', '.join(NAMES)}")


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


def _check_classes(
    config: Mapping[str, Any], task: str, classes: Sequence[str] | None
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Returns the model's classes and those of `data.classes`, None where there are none."""
    least = 1 if task in ("multilabel", "regress") else 2
    count = "two or more names" if least == 2 else "names"
    named = split_names(str(config.get("classes") or ""), "data.classes") or None
    if named and len(named) < least:
        raise UserError(f"data.classes={config['classes']!r} must be {count}, comma-separated")
    if classes is None:
        return None, named
    model = tuple(classes)
    if len(model) < least or len(set(model)) < len(model):
        raise UserError(f"the model's classes ({', '.join(model)}) are not {count}")
    if named:
        check_equal_classes("data.classes", named, model)
    return model, named


def _train_plan(config: Mapping[str, Any], training: bool) -> TrainPlan:
    """Returns what to make of the training images; UserError for two draws of them at once."""
    per_class = _integer("data.per_class", config.get("per_class", 0), 0, 10**6)
    fraction = _number("data.train_fraction", config.get("train_fraction", 1.0))
    if not 0 < fraction <= 1:
        raise UserError(f"data.train_fraction must lie above 0 and at most at 1, not {fraction}")
    if per_class and fraction < 1:
        raise UserError(
            f"data.per_class={per_class} and data.train_fraction={fraction} both draw training "
            "images: set per_class to 0 or train_fraction to 1"
        )
    return TrainPlan(
        per_class,
        config.get("val_fraction", 0.15),
        _integer("data.seed_split", config.get("seed_split", 0), 0, 2**32 - 1),
        train_fraction=fraction,
        seed_draw=_integer("data.seed_draw", config.get("seed_draw", 0), 0, 2**32 - 1),
        training=training,
    )


def _held_out(config: Mapping[str, Any]) -> HeldOut:
    """Returns how a table without splits is divided; UserError where it has them already."""
    folds = _integer("data.folds", config.get("folds", 0), 0, 1000)
    fold = _integer("data.fold", config.get("fold", 0), 0, max(folds - 1, 0))
    if folds == 1:
        raise UserError("data.folds=1 leaves nothing to train on: set 2 or more, or 0 for none")
    if folds and (config.get("name") != "csv" or config.get("csv_split_column", "split")):
        raise UserError(
            f"data.folds={folds} divides a table without splits: it needs data.name=csv and "
            "data.csv_split_column=''"
        )
    fraction = config.get("test_fraction", 0.2)
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise UserError(f"data.test_fraction must lie between 0 and 1, not {fraction!r}")
    seed = _integer("data.seed_split", config.get("seed_split", 0), 0, 2**32 - 1)
    return HeldOut(float(fraction), folds, fold, seed)


def _load_phantom(config: Mapping[str, Any], wanted: Wanted) -> Dataset:
    # The generator's modules are loaded by their users alone.
    from medtl_jax.data import phantom, phantom_tasks

    options = dict(config.get("phantom") or {})
    unknown = sorted(set(options) - {"train", "val", "test", "domain"})
    if unknown:
        raise UserError(f"unknown key data.phantom.{unknown[0]}: use train, val, test, domain")
    task, seed = wanted.task or "classify", wanted.plan.seed
    own = phantom_tasks.CLASSES[task]
    check_equal_classes("the phantom", own, wanted.model)
    _check_named("the phantom", own, wanted)
    whole = phantom.make_phantom(wanted.image_size, **options, seed=seed, splits=wanted.splits)
    return reduce_train(phantom_tasks.retarget(whole, task, seed), wanted.plan)


def _load_named_npz(path: Path, wanted: Wanted) -> Dataset:
    """Returns the .npz set with a note on where its class names come from."""
    named = wanted.named or names_by_file_name(path, wanted.task)
    dataset = load_npz(
        path,
        wanted.image_size,
        wanted.progress,
        wanted.model or named,
        splits=wanted.splits,
        complete=wanted.model is None,
        plan=wanted.plan,
        task=wanted.task,
    )
    if named in (None, wanted.model, wanted.named):
        return dataset
    note = "class names are MedMNIST's, by the file's name; its MD5 was not checked"
    if wanted.model is not None:
        note = f"class names are the model's; by the file's name they are {', '.join(named)}"
    spec = dataclasses.replace(dataset.spec, notes=(*dataset.spec.notes, note))
    return dataclasses.replace(dataset, spec=spec)


def _check_named(name: str, own: tuple[str, ...], wanted: Wanted) -> None:
    """Raises UserError where `data.classes` names others than the set's own, which are fixed."""
    if wanted.named not in (None, own):
        raise UserError(
            f"data.classes ({', '.join(wanted.named)}) are not the classes of {name} "
            f"({', '.join(own)}): leave it empty"
        )


def _to_grey(dataset: Dataset) -> Dataset:
    splits = {
        name: dataclasses.replace(split, images=to_grey(split.images))
        if split.images.shape[-1] != 1
        else split
        for name, split in dataset.splits.items()
    }
    return dataclasses.replace(dataset, splits=splits)


def _required_path(config: Mapping[str, Any], what: str) -> Path:
    text = str(config.get("dir") or "")
    if not text:
        raise UserError(f"data.dir is empty: set it to {what} for data.name={config['name']}")
    return user_path(text, "data.dir")


def _integer(key: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"{key} must be an integer from {low} to {high}, not {value!r}")
    return value


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise UserError(f"{key} must be a number of 0 or more, not {value!r}")
    return float(value)
