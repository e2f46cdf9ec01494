"""The phantom's targets of each task, from what is known of its slices; the images stay the same.

Multi-label: is there a lesion, is it solid (nodule or infiltrate), is it large; one label in ten
is not known. Ordinal: the lesion's grade by its size. Segmentation: the lesion. Regression: its
area.
"""

import dataclasses

import numpy as np

from medtl_jax.data import phantom
from medtl_jax.data.catalog import MISSING, SPLITS, Dataset, Split

# Areas in mm^2. The two grades' limits are about the tertiles of the lesions' areas, and "large"
# begins at about their median.
GRADE_LIMITS = (1350.0, 1750.0)
LARGE = 1550.0
UNKNOWN_FRACTION = 0.1

CLASSES = {
    "classify": phantom.CLASSES,
    "multilabel": ("lesion", "solid", "large"),
    "ordinal": ("none", "small", "medium", "large"),
    "segment": ("background", "lesion"),
    "regress": ("lesion_area_mm2",),
}

# The generator's own streams of random numbers have smaller numbers.
_UNKNOWN_STREAM = 100


def retarget(dataset: Dataset, task: str, seed: int) -> Dataset:
    """Returns the phantom data set with the target of `task` in place of the classes.

    Args:
      dataset: as `phantom.make_phantom` returns it.
      task: one of `catalog.TASKS`.
      seed: the one that it was made with; it says which labels are not known.
    """
    if task == "classify":
        return dataset
    splits = {
        name: dataclasses.replace(split, target=_target(split, task, seed, SPLITS.index(name)))
        for name, split in dataset.splits.items()
    }
    spec = dataclasses.replace(dataset.spec, task=task, classes=CLASSES[task])
    return Dataset(spec, splits)


def _target(split: Split, task: str, seed: int, number: int) -> np.ndarray:
    """Returns the target of the slices of split `number`, as in `catalog.Split`."""
    area = split.extra["size"]
    if task == "segment":
        return split.extra["mask"]
    if task == "regress":
        return area[:, None].copy()
    lesion = split.target != phantom.CLASSES.index("normal")
    if task == "ordinal":
        return np.where(lesion, 1 + np.digitize(area, GRADE_LIMITS), 0).astype(np.int32)
    solid = np.isin(split.target, [phantom.CLASSES.index(n) for n in ("nodule", "infiltrate")])
    findings = np.stack([lesion, solid, area >= LARGE], axis=1).astype(np.int8)
    # A generator for each slice: a label does not depend on how many slices are made.
    draws = [
        np.random.default_rng([seed, number, _UNKNOWN_STREAM, row]).random(findings.shape[1])
        for row in range(len(findings))
    ]
    findings[np.stack(draws) < UNKNOWN_FRACTION] = MISSING
    return findings
