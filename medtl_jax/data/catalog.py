"""What a data set is: its specification, its splits, and the sets known by name."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from medtl_jax.errors import UserError

SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What is known about a data set before any model sees it.

    Attributes:
      name: as in `config.data.name`, or the folder's or file's own name.
      task: `"classify"` (one label an image).
      classes: class names; the index in this tuple is the label.
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
    """The images of one split, decoded and resized, in memory.

    Attributes:
      images: uint8 `[n, h, w, c]`, c = 1 (grey) or 3 (RGB), h = w = image size.
      labels: int32 `[n]`, indices into `DataSpec.classes`.
      ids: str `[n]`, unique over the whole data set.
      patients: str `[n]`, or None where the set has no patient column.
      extra: further arrays of length n (the phantom's masks, sizes, boxes, domains).
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    patients: np.ndarray | None = None
    extra: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A specification and its splits: `train`, `val` and `test`, or those that were asked for."""

    spec: DataSpec
    splits: dict[str, Split]

    def checksum(self) -> str:
        """SHA-256 (hex) over class names and every split's ids, patients, labels and pixels."""
        digest = hashlib.sha256()
        digest.update(json.dumps(self.spec.classes).encode())
        for name in sorted(self.splits):
            split = self.splits[name]
            digest.update(f"{name} {split.images.shape}\n".encode())
            digest.update(json.dumps(split.ids.tolist()).encode())
            if split.patients is not None:
                digest.update(json.dumps(split.patients.tolist()).encode())
            digest.update(np.ascontiguousarray(split.labels, np.int32).tobytes())
            digest.update(np.ascontiguousarray(split.images))
        return digest.hexdigest()


def absent_classes(classes: Sequence[str], splits: Mapping[str, Split]) -> tuple[str, ...]:
    """Returns one note for each split that has no image of some of the classes."""
    notes = []
    for name, split in splits.items():
        present = set(split.labels.tolist())
        absent = [label for index, label in enumerate(classes) if index not in present]
        if absent:
            notes.append(f"{name} has no image of {', '.join(absent)}")
    return tuple(notes)


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
