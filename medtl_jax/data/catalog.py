"""What a data set is: its specification, its splits, and the sets known by name."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from medtl_jax.errors import UserError

SPLITS = ("train", "val", "test")
TASKS = ("classify", "multilabel", "ordinal", "segment", "regress")
# In the target of a multi-label image: nobody said.
MISSING = -1


# Images or masks looked at together: streamed ones are decoded for it.
_BLOCK = 64
_VALUE = {"multilabel": "label", "regress": "value"}


class Array(Protocol):
    """What `np.ndarray` and `streams.Streamed` have in common: rows that can be taken."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`[n, ...]`."""

    @property
    def dtype(self) -> np.dtype:
        """Of the elements."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows) -> np.ndarray:
        """The rows at a slice, at indices `[m]`, or (without the leading axis) at one index."""


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What is known about a data set before any model sees it.

    Attributes:
      name: as in `config.data.name`, or the folder's or file's own name.
      task: one of `TASKS`: one label an image; several findings, each present or not; one label
        of ordered classes; a class for every pixel; numbers.
      classes: names. `classify`, `segment`: the index in this tuple is the label, and the
        background comes first; `ordinal`: from the lowest rank to the highest; `multilabel`:
        of the findings; `regress`: of the numbers to predict.
      licence: licence of the images, `"unknown"` when nobody said.
      source: where the data came from (a path, a URL, or the generator).
      notes: lines about what the reader decided (a validation split made from the
        training split, 12-bit files rescaled), shown to the user and in the report.
    """

    name: str
    task: str
    classes: tuple[str, ...]
    licence: str = "unknown"
    source: str = ""
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of one split, decoded and resized, in memory or streamed from their files.

    Attributes:
      images: uint8 `[n, h, w, c]`, c = 1 (grey) or 3 (RGB), h = w = image size.
      target: what is to be predicted. `classify`, `ordinal`: int32 `[n]`, indices into
        `DataSpec.classes`; `multilabel`: int8 `[n, k]`, 1 present, 0 absent, `MISSING` unknown;
        `segment`: uint8 `[n, h, w]`, class of each pixel; `regress`: float32 `[n, k]`, NaN
        where unknown.
      ids: str `[n]`, unique over the whole data set.
      patients: str `[n]`, or None where the set has no patient column.
      extra: further arrays of length n (the phantom's masks, sizes, boxes, domains; `mask2`,
        uint8 `[n, h, w]`, where a second observer drew masks).
    """

    images: Array
    target: Array
    ids: np.ndarray
    patients: np.ndarray | None = None
    extra: dict[str, Array] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A specification and its splits: `train`, `val` and `test`, or those that were asked for."""

    spec: DataSpec
    splits: dict[str, Split]

    def checksum(self) -> str:
        """SHA-256 (hex) over class names and every split's ids, patients, targets and pixels.

        The masks of a second observer count as well.
        """
        return self._checksum

    @functools.cached_property
    def _checksum(self) -> str:
        # Once: of a streamed set every file is decoded for it.
        digest = hashlib.sha256()
        digest.update(json.dumps([self.spec.task, self.spec.classes]).encode())
        for name in sorted(self.splits):
            split = self.splits[name]
            digest.update(f"{name} {split.images.shape}\n".encode())
            digest.update(json.dumps(split.ids.tolist()).encode())
            if split.patients is not None:
                digest.update(json.dumps(split.patients.tolist()).encode())
            second = [split.extra["mask2"]] if "mask2" in split.extra else []
            for array in (split.target, split.images, *second):
                digest.update(f"{array.dtype} {array.shape}\n".encode())
                for start in range(0, len(array), _BLOCK):
                    digest.update(np.ascontiguousarray(array[start : start + _BLOCK]))
        return digest.hexdigest()


def absent_classes(
    classes: Sequence[str], splits: Mapping[str, Split], task: str = "classify"
) -> tuple[str, ...]:
    """Returns notes on each split that has no image of some classes, findings or numbers.

    A finding of which nothing is known is told from one that is nowhere present. Of masks are
    read as many as it takes to see every class.
    """
    what = "pixel" if task == "segment" else "image"
    notes = []
    for name, split in splits.items():
        known = known_columns(task, split.target, len(classes))
        present = present_classes(task, split.target, len(classes))
        unknown = [label for label, found in zip(classes, known, strict=True) if not found]
        absent = [
            label for label, found in zip(classes, present | ~known, strict=True) if not found
        ]
        if absent:
            notes.append(f"{name} has no {what} of {', '.join(absent)}")
        if unknown:
            notes.append(f"{name} has no known {_VALUE[task]} of {', '.join(unknown)}")
    return tuple(notes)


def known_columns(task: str, target: Array, count: int) -> np.ndarray:
    """Returns bool `[count]`: of which findings or numbers anything is known; of classes True."""
    if task == "multilabel":
        return (target != MISSING).any(axis=0)
    if task == "regress":
        return np.isfinite(target).any(axis=0)
    return np.ones(count, bool)


def present_classes(task: str, target: Array, count: int) -> np.ndarray:
    """Returns bool `[count]`: which classes, findings or numbers occur in the target."""
    if task == "multilabel":
        return (target == 1).any(axis=0)
    if task == "segment":
        return _classes_of_masks(target, count)
    if task == "regress":
        return known_columns(task, target, count)
    return np.isin(np.arange(count), target)


def _classes_of_masks(masks: Array, count: int) -> np.ndarray:
    """Returns bool `[count]`: which classes have a pixel; reads on until each of them has one."""
    found = np.zeros(count, bool)
    for start in range(0, len(masks), _BLOCK):
        for mask in masks[start : start + _BLOCK]:
            found |= np.bincount(mask.ravel(), minlength=count) > 0
        if found.all():
            break
    return found


def check_equal_classes(
    name: str, classes: tuple[str, ...], wanted: tuple[str, ...] | None
) -> None:
    """Raises UserError unless `classes` of the set `name` are those of the model, if there is one.

    The order counts: a class's place is its label.
    """
    if wanted is not None and wanted != classes:
        raise UserError(
            f"the classes of {name} ({', '.join(classes)}) are not those of the model "
            f"({', '.join(wanted)}): choose a set with the model's classes"
        )
