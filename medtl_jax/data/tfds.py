"""A TFDS set as a `Dataset`: which features are the image, the target, the patient and the id."""

import collections
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from medtl_jax.data.catalog import MISSING, TASKS, Dataset, check_equal_classes
from medtl_jax.data.csvlist import check_rows, choose_splits
from medtl_jax.data.listed import Wanted, assemble
from medtl_jax.data.listing import Entry
from medtl_jax.data.strata import CLASS_TASKS
from medtl_jax.data.targets import is_unknown
from medtl_jax.data.tfds_files import (
    PreparedSet,
    Record,
    SplitReader,
    open_prepared,
    or_damaged,
)
from medtl_jax.errors import UserError

# Kinds of features that can be the target of a task.
_FITTING = {
    "classify": ("label",),
    "ordinal": ("label",),
    "multilabel": ("labels", "flags"),
    "segment": ("image",),
    "regress": ("number", "numbers", "flags"),
}
# The task where neither the user nor the set names one, by the kind of its target; of a set with
# several the first.
_MEANT = {
    "label": "classify",
    "labels": "multilabel",
    "flags": "multilabel",
    "image": "segment",
    "number": "regress",
    "numbers": "regress",
}
_TARGET_NAMES = ("target", "label", "labels", "mask", "segmentation_mask")
_PATIENT_NAMES = ("patient", "patient_id")
# A description may declare any number of classes, which it costs it nothing to do.
_MOST_CLASSES = 10_000


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which features of a set are what.

    Attributes:
      task: one of `catalog.TASKS`.
      image: name of the image.
      targets: name of what is to be predicted; of several numbers, their names.
      mask2: name of a second observer's mask, None where there is none.
      patient, id: names, None where there is none.
      names: classes, findings or numbers; None where a mask says none.
      listed: whether the target lists the findings that are present.
    """

    task: str
    image: str
    targets: tuple[str, ...]
    mask2: str | None
    patient: str | None
    id: str | None
    names: tuple[str, ...] | None
    listed: bool


def load_tfds(name: str, root: Path, wanted: Wanted) -> Dataset:
    """Returns the TFDS set `name` that is prepared in the folder `root`, as array_record.

    It is read without TensorFlow, and nothing is downloaded. Images are decoded from the bytes
    that are stored, as from a file. The splits train, validation (or val, valid, dev) and test
    are read. Ids are "train/000012", or those of a text or integer feature `id`, which get the
    name of their split in front ("train/7") where two splits have the same ones.

    The image is the feature `image`, or the only one that is an image. The target is that of the
    set's supervised keys, a feature called target, label, labels, mask or segmentation_mask, or
    the only one that fits the task: a ClassLabel (`classify`, `ordinal`), a sequence of
    the ClassLabels that are present or a vector of integers 0, 1 and -1 for unknown
    (`multilabel`), a second image (`segment`), a vector or any number of scalars (`regress`). A
    feature `patient` or `patient_id` names the patient; `mask2` is the mask of a second observer.

    Args:
      name: "builder", "builder/config" or "builder:1.0.0".
      root: TFDS's data_dir.
      wanted: what is asked for. Without a task, what the set was written for, or the first of
        the targets named above that it has.

    Raises:
      UserError: there is no such set, it is damaged, or has no fitting features; as
        `listed.assemble`.
    """
    prepared = open_prepared(name, root)
    roles = find_roles(prepared, wanted)
    names = roles.names
    _check_model(name, roles, wanted.model)
    if wanted.named and names and wanted.named != names:
        raise UserError(
            f"data.classes ({', '.join(wanted.named)}) are not the classes of tfds/{name} "
            f"({', '.join(names)}): leave it empty"
        )
    entries = [
        entry
        for reader in prepared.readers.values()
        for entry in or_damaged(prepared.folder, lambda reader=reader: _entries(reader, roles))
    ]
    if not entries:
        raise UserError(f"{prepared.folder} has none of the splits train, validation and test")
    entries = _with_own_ids(entries)
    check_rows(entries, prepared.folder)
    way_out = "export the set as csv and have a test split drawn from that"
    entries, notes = choose_splits(entries, wanted.splits, prepared.folder, way_out)
    if len(roles.targets) > 1:
        notes += (f"every number of the set is to be predicted: {', '.join(roles.targets)}",)
    if roles.patient is None:
        notes += ("no feature patient: leakage of patients not checked",)
    if names and roles.task in ("multilabel", "regress"):
        entries, names = _in_order(entries, names, wanted.model or names)
    wanted = dataclasses.replace(wanted, named=names or wanted.named)
    dataset = assemble(entries, roles.task, names or (), wanted, prepared.folder, notes)
    licence = prepared.licence or "unknown"
    spec = dataclasses.replace(dataset.spec, name=f"tfds/{name}", licence=licence)
    return dataclasses.replace(dataset, spec=spec)


def _check_model(name: str, roles: Roles, model: tuple[str, ...] | None) -> None:
    """Raises UserError for a mask of other classes, or other findings or numbers, than the model's.

    Labels of images are compared one by one, as those of other sets.
    """
    names = roles.names
    if model is None or names is None or roles.task in CLASS_TASKS:
        return
    if roles.task == "segment" or set(names) != set(model):
        check_equal_classes(f"tfds/{name}", names, model)


def find_roles(prepared: PreparedSet, wanted: Wanted) -> Roles:
    """Returns which features are what, for `wanted.task` or the task that the set suggests.

    Raises:
      UserError: there is no image, or no or no single target.
    """
    kinds = {name: _kind(feature) for name, feature in prepared.features.items()}
    image = _find_image(kinds, prepared)
    patient = next((name for name in _PATIENT_NAMES if kinds.get(name) in _TEXTS), None)
    own_id = "id" if kinds.get("id") in _TEXTS else None
    mask2 = "mask2" if kinds.get("mask2") == "image" else None
    taken = (image, mask2, patient, "id")
    others = {name: kind for name, kind in kinds.items() if name not in taken}
    task = wanted.task or _suggested_task(others, prepared)
    targets = _find_targets(task, others, prepared)
    names = _names(task, targets, prepared, wanted)
    listed = kinds[targets[0]] == "labels"
    # Of a fixed number of labels each may stand for its own question.
    length = prepared.features[targets[0]].get_tensor_info().shape[0] if listed else None
    if length is not None:
        raise UserError(
            f"{prepared.folder}: the feature {targets[0]} is a sequence of exactly {length} labels "
            "and not a list of the findings that are present: write them as a vector of 0 and 1"
        )
    return Roles(task, image, targets, mask2, patient, own_id, names, listed)


_TEXTS = ("text", "number")


def _kind(feature: Any) -> str:
    """Returns image, label, labels, text, number, numbers (a vector), flags (integers) or other."""
    features = tfds.features
    if isinstance(feature, features.Image):
        return "image"
    if isinstance(feature, features.ClassLabel):
        return "label"
    if isinstance(feature, features.Sequence):
        return "labels" if isinstance(feature.feature, features.ClassLabel) else "other"
    if isinstance(feature, features.Text):
        return "text"
    # Of the subclasses only the scalar: boxes and sounds are tensors as well.
    if type(feature) not in (features.Tensor, features.Scalar):
        return "other"
    dtype = np.dtype(feature.np_dtype).kind
    if feature.shape == ():
        return "number" if dtype in "biuf" else "text"
    if dtype not in "biuf" or len(feature.shape) != 1 or not feature.shape[0]:
        return "other"
    return "numbers" if dtype == "f" else "flags"


def _find_image(kinds: Mapping[str, str], prepared: PreparedSet) -> str:
    found = [name for name, kind in kinds.items() if kind == "image"]
    if kinds.get("image") in ("image", "text"):
        return "image"
    if len(found) != 1:
        raise UserError(
            f"{prepared.folder}: no feature is called image and {len(found)} are images; "
            f"it has {', '.join(kinds)}"
        )
    return found[0]


def _suggested_task(others: Mapping[str, str], prepared: PreparedSet) -> str:
    noted = prepared.metadata.get("task")
    if noted in TASKS:
        return noted
    if prepared.supervised and others.get(prepared.supervised[1]) in _MEANT:
        return _MEANT[others[prepared.supervised[1]]]
    found = next((task for kind, task in _MEANT.items() if kind in others.values()), None)
    if found is None:
        raise UserError(
            f"{prepared.folder}: no feature is a label, a mask or a number; it has "
            f"{', '.join(prepared.features)}"
        )
    return found


def _find_targets(task: str, others: Mapping[str, str], prepared: PreparedSet) -> tuple[str, ...]:
    fitting = sorted(name for name, kind in others.items() if kind in _FITTING[task])
    preferred = (*(prepared.supervised or ())[1:], *_TARGET_NAMES)
    for name in preferred:
        if name in fitting:
            return (name,)
    scalars = task == "regress" and all(others[name] == "number" for name in fitting)
    if len(fitting) == 1 or (fitting and scalars):
        return tuple(fitting)
    found = f"several fit ({', '.join(fitting)})" if fitting else "none fits"
    raise UserError(
        f"{prepared.folder}: task={task} needs one feature as its target and {found}; "
        f"it has {', '.join(prepared.features)}"
    )


def _names(
    task: str, targets: tuple[str, ...], prepared: PreparedSet, wanted: Wanted
) -> tuple[str, ...] | None:
    feature = prepared.features[targets[0]]
    noted = prepared.metadata.get("classes")
    noted = tuple(map(str, noted)) if isinstance(noted, list) else None
    if task == "segment":
        labelled = isinstance(feature, tfds.features.LabeledImage)
        return tuple(feature.names or ()) or noted if labelled else noted
    kind = _kind(feature)
    if kind in ("label", "labels"):
        feature = feature if kind == "label" else feature.feature
        _check_count(feature.num_classes, targets[0], prepared)
        return tuple(feature.names or map(str, range(feature.num_classes)))
    if kind == "number":
        return targets
    count = feature.shape[0]
    _check_count(count, targets[0], prepared)
    numbered = tuple(f"{targets[0]}_{number}" for number in range(count))
    # A model that was trained on numbered ones knows them by these names, in whatever order.
    model = None if set(wanted.model or ()) == set(numbered) else wanted.model
    fitting = (known for known in (noted, wanted.named, model) if known and len(known) == count)
    return next(fitting, numbered)


def _check_count(count: int, name: str, prepared: PreparedSet) -> None:
    if count > _MOST_CLASSES:
        raise UserError(
            f"{prepared.folder}: the feature {name} declares {count} classes or numbers, more than "
            f"the limit of {_MOST_CLASSES:,}"
        )


def _with_own_ids(entries: list[Entry]) -> list[Entry]:
    """Returns the entries; where ids start anew in each split, the split's name is put in front."""
    splits = collections.defaultdict(set)
    for entry in entries:
        splits[entry.id].add(entry.split)
    if all(len(found) == 1 for found in splits.values()):
        return entries
    return [dataclasses.replace(entry, id=f"{entry.split}/{entry.id}") for entry in entries]


def _entries(reader: SplitReader, roles: Roles) -> list[Entry]:
    """Returns the images of a split, their labels, findings or numbers as text."""
    asked = {roles.patient, roles.id} - {None}
    mask = mask2 = None
    if roles.task != "segment":
        asked |= set(roles.targets)
    entries = []
    for index, row in enumerate(reader.rows(asked)):
        own = f"{reader.name}/{index:06d}" if roles.id is None else _text(row[roles.id])
        if roles.task == "segment":
            mask = Record(reader, index, roles.targets[0])
            mask2 = Record(reader, index, roles.mask2) if roles.mask2 else None
        entries.append(
            Entry(
                Record(reader, index, roles.image),
                own,
                reader.name,
                _cells(row, roles, own),
                None if roles.patient is None else _patient(row[roles.patient], own),
                mask,
                mask2,
            )
        )
    return entries


def _cells(row: Mapping[str, Any], roles: Roles, own: str) -> tuple[str, ...]:
    if roles.task == "segment":
        return ()
    value = row[roles.targets[0]]
    if roles.task in CLASS_TASKS:
        if not 0 <= value < len(roles.names):
            raise UserError(f"{own} has no label ({value}): leave its split out")
        return (roles.names[value],)
    if roles.task == "regress":
        numbers = np.ravel([row[name] for name in roles.targets]).tolist()
        return tuple("" if math.isnan(number) else repr(float(number)) for number in numbers)
    numbers = np.asarray(value).tolist()
    if roles.listed:
        _check_listed(numbers, roles.names, own)
        return tuple(str(int(place in numbers)) for place in range(len(roles.names)))
    return tuple("" if number == MISSING else f"{number:g}" for number in numbers)


def _check_listed(numbers: list[int], names: tuple[str, ...], own: str) -> None:
    """Raises UserError unless the numbers are different findings."""
    wrong = [number for number in numbers if not 0 <= number < len(names)]
    if wrong:
        raise UserError(f"{own} lists the label {wrong[0]}, which is no finding: leave it out")
    if len(set(numbers)) < len(numbers):
        twice = collections.Counter(numbers).most_common(1)[0][0]
        raise UserError(
            f"{own} lists the label '{names[twice]}' more than once, so that its labels are no "
            "list of findings: write them as a vector of 0 and 1"
        )


def _patient(value: Any, own: str) -> str:
    name = _text(value)
    if is_unknown(name):
        raise UserError(f"{own} has the patient '{name}', which is no name: write the set anew")
    return name


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _in_order(
    entries: list[Entry], names: tuple[str, ...], order: tuple[str, ...]
) -> tuple[list[Entry], tuple[str, ...]]:
    """Returns the entries with their cells in the order of the names `order`, and `order`."""
    places = [names.index(name) for name in order]
    reordered = [
        dataclasses.replace(entry, cells=tuple(entry.cells[place] for place in places))
        for entry in entries
    ]
    return reordered, order
