"""One data set for many runs that draw from it: decoded once, its validation and test held once."""

import dataclasses
import json
from collections.abc import Callable

import numpy as np

from medtl_jax.data.catalog import Dataset
from medtl_jax.data.domains import Seen
from medtl_jax.data.strata import CLASS_TASKS
from medtl_jax.data.subset import TrainPlan, reduce_train

# Keys of a section `data` that only say which training images are drawn.
_DRAWS = ("per_class", "train_fraction", "seed_draw")


@dataclasses.dataclass(frozen=True)
class _Target:
    """The target of an adaptation, and the images of both domains that were compared so far."""

    dataset: Dataset
    seen: Seen = dataclasses.field(default_factory=dict)


def kept_target(made_of: dict, memo: dict, read: Callable[[], Dataset]) -> tuple[Dataset, Seen]:
    """What `read` gives, from `memo` where it is there, and what `check_domains` may keep for it.

    Args:
      made_of: what decides what is read, JSON-ready: the keys of a section `data`, whose draws
        take nothing from a target, and whatever else there is.
      memo: as of `remembered`, beside whose sets it is kept. It is changed here.
      read: decodes the set.
    """
    key = json.dumps({name: value for name, value in made_of.items() if name not in _DRAWS})
    if key not in memo:
        memo[key] = _Target(read())
    return memo[key].dataset, memo[key].seen


def _sets(memo: dict) -> dict[str, Dataset]:
    """What `remembered` has put into a memo."""
    return {key: found for key, found in memo.items() if isinstance(found, Dataset)}


def remembered(data: dict, memo: dict[str, Dataset], read: Callable[[dict], Dataset]) -> Dataset:
    """What `read` gives for `data`, from `memo` as far as it is there.

    The whole set is kept, and `train_fraction` draws from it. Where a draw depends on more than
    the training images, by the bins of a number or the counts of a finding, it is read by itself;
    those of one fraction are kept.

    Args:
      data: the section of a config; those for one memo differ in their draws alone.
      memo: starts empty, and is changed here.
      read: decodes the set of such a section.
    """
    fraction, name = data["train_fraction"], data["name"]
    seed = data["seed_draw"] if data["per_class"] else 0
    whole = _kept({**data, "train_fraction": 1.0, "seed_draw": seed}, memo, read)
    if fraction == 1:
        return whole
    if whole.spec.task in CLASS_TASKS or name == "phantom" or name.startswith("medmnist/"):
        plan = TrainPlan(train_fraction=fraction, seed_draw=data["seed_draw"])
        return reduce_train(whole, plan)
    for key in _sets(memo):
        if json.loads(key)["train_fraction"] not in (1, fraction):
            del memo[key]
    return _kept(data, memo, read)


def _kept(data: dict, memo: dict[str, Dataset], read: Callable[[dict], Dataset]) -> Dataset:
    """The set of `data`, which shares with those of `memo` the splits that are the same."""
    key = json.dumps(data)
    if key not in memo:
        found = read(data)
        splits = {
            name: next(
                (
                    other.splits[name]
                    for other in _sets(memo).values()
                    if np.array_equal(other.splits[name].ids, split.ids)
                ),
                split,
            )
            for name, split in found.splits.items()
        }
        memo[key] = dataclasses.replace(found, splits=splits)
    return memo[key]
