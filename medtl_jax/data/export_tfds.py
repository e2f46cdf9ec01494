"""Data sets written as TFDS: array_record with PNG bytes, without TensorFlow."""

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from medtl_jax.data.catalog import Dataset, DataSpec, Split
from medtl_jax.data.export import Step, encoded
from medtl_jax.data.strata import CLASS_TASKS
from medtl_jax.errors import UserError

VERSION = "1.0.0"

_SPLIT_NAMES = {"train": "train", "val": "validation", "test": "test"}
_NAME = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)

_Examples = Iterator[tuple[int, dict[str, Any]]]


def write_tfds(
    dataset: Dataset, draft: Path, path: Path, step: Step
) -> tuple[dict[str, str], set[str]]:
    """Returns the configuration that reads the set, and what of it was kept beside the targets.

    The builder's folder is written to `draft`; its name is the last part of `path`. A record has
    the features image, target (label, mask), id and, where they are known, patient and mask2.

    Raises:
      UserError: that name cannot be a builder's.
    """
    if not _NAME.fullmatch(path.name):
        raise UserError(
            f"'{path.name}' cannot be the name of a TFDS set: use lower-case letters, digits and "
            "_, starting with a letter"
        )
    splits = dataset.splits
    kept = set()
    if all(split.patients is not None for split in splits.values()):
        kept.add("patient")
    if all("mask2" in split.extra for split in splits.values()):
        kept.add("mask2")
    channels = {split.images.shape[-1] for split in splits.values()}
    features = _features(dataset.spec, channels.pop(), kept)
    makers = {
        _SPLIT_NAMES[name]: lambda split=split: _examples(dataset.spec, split, kept, step)
        for name, split in splits.items()
    }
    # TFDS prints what it does, in the words of a download; here `step` tells.
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder = _SetBuilder(path.name, draft.parent, dataset.spec, features, makers)
        builder.download_and_prepare()
    return {"data.name": f"tfds/{path.name}", "data.dir": str(path.parent)}, kept


class _LocalInfo(tfds.core.DatasetInfo):
    """A description that is made here: TFDS would look for a published one of the same name."""

    def initialize_from_bucket(self) -> None:
        """Asks no server, and leaves no temporary folder behind."""


class _SetBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes what the generators of a set's splits yield, in their order."""

    VERSION = tfds.core.Version(VERSION)
    # TFDS looks for checksums of downloads beside a builder's code: here there are none.
    code_path = None

    def __init__(
        self,
        name: str,
        folder: Path,
        spec: DataSpec,
        features: tfds.features.FeaturesDict,
        makers: Mapping[str, Callable[[], _Examples]],
    ):
        self.name = name
        self._spec, self._features, self._makers = spec, features, makers
        super().__init__(data_dir=folder, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        spec = self._spec
        return _LocalInfo(
            builder=self,
            description=f"{spec.name}, from {spec.source or 'an unnamed source'}.",
            features=self._features,
            metadata=tfds.core.MetadataDict(task=spec.task, classes=list(spec.classes)),
            license=None if spec.licence == "unknown" else spec.licence,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
        return {name: maker() for name, maker in self._makers.items()}

    def _generate_examples(self) -> _Examples:
        raise AssertionError("the generators of the splits yield the examples")


def _features(spec: DataSpec, channels: int, kept: set[str]) -> tfds.features.FeaturesDict:
    kinds = tfds.features
    features = {
        "image": kinds.Image(shape=(None, None, channels), encoding_format="png"),
        "id": kinds.Text(),
    }
    if "patient" in kept:
        features["patient"] = kinds.Text()
    if "mask2" in kept:
        features["mask2"] = kinds.Image(shape=(None, None, 1), encoding_format="png")
    if spec.task in CLASS_TASKS:
        features["label"] = kinds.ClassLabel(names=list(spec.classes))
    elif spec.task == "segment":
        shape = (None, None, 1)
        features["mask"] = kinds.LabeledImage(
            labels=list(spec.classes), shape=shape, encoding_format="png"
        )
    else:
        dtype = np.int8 if spec.task == "multilabel" else np.float32
        features["target"] = kinds.Tensor(shape=(len(spec.classes),), dtype=dtype)
    return kinds.FeaturesDict(features)


def _examples(spec: DataSpec, split: Split, kept: set[str], step: Step) -> _Examples:
    task = spec.task
    name = "label" if task in CLASS_TASKS else "mask" if task == "segment" else "target"
    targets = encoded(split.target) if task == "segment" else iter(split.target)
    second = encoded(split.extra["mask2"]) if "mask2" in kept else None
    for row, image in enumerate(encoded(split.images)):
        example = {"image": image, name: next(targets), "id": str(split.ids[row])}
        if second is not None:
            example["mask2"] = next(second)
        if "patient" in kept:
            example["patient"] = str(split.patients[row])
        yield row, example
        step(1)
