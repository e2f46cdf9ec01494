"""Small runs on drawn digits that are adapted to unlabelled ones, see `digit_runs`."""

import numpy as np
from digit_runs import digits, run

SMALL = {"model__name": "lenet5_bn", "domain__target__name": "npz", "domain__width": 16}
DANN = {**SMALL, "domain__method": "dann"}


def other_digits(count, seed):
    """Digits of another scanner: dark on light, with less contrast."""
    images, labels = digits(count, 5, seed)
    return 255 - images // 2, labels


def write_target(path, train=48, test=30, **changes):
    """A target .npz; `changes` replace arrays, or with None take them away."""
    arrays = {}
    for seed, (split, count) in enumerate({"train": train, "val": 15, "test": test}.items(), 70):
        images, labels = other_digits(count, seed)
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    arrays = {name: array for name, array in (arrays | changes).items() if array is not None}
    np.savez(path, **arrays)
    return str(path)


def adapted(folder, five, target, **settings):
    """The folder of a run from random weights that is adapted to the file `target`."""
    keys = {"model__weights": "none", **SMALL, "domain__target__dir": target, **settings}
    return run(folder, five, None, **keys)
