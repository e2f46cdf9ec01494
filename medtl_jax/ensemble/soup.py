"""Model soups: one network whose weights are the mean of those of several (Wortsman et al. 2022).

The members must lie in one basin of the loss, as fine-tunings of the same pretrained weights mostly
do. A mean of weights has batch statistics of its own: see `training.reestimate`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

# Nested dicts of float arrays, all members' of the same structure and shapes.
Tree = Any


@dataclasses.dataclass(frozen=True)
class Soup:
    """A mean of weights.

    Attributes:
      variables: the mean, finished.
      members: the places of the members in it, in the order in which they were tried.
    """

    variables: Tree
    members: tuple[int, ...]


def uniform_soup(members: Iterable[Tree]) -> Tree:
    """Returns the mean of the trees (section 2, "uniform soup"). ValueError where there are none.

    Each tree is held while it is added, so that they may be read one by one.
    """
    mean = None
    for count, tree in enumerate(members):
        mean = tree if mean is None else _with(mean, count, tree)
    if mean is None:
        raise ValueError("no members to average")
    return mean


def greedy_soup(
    members: Iterable[Tree],
    finish: Callable[[Tree], Tree],
    value: Callable[[Tree], float],
    more_is_better: bool,
) -> Soup:
    """Returns the greedy soup (algorithm 1): each member is kept where the soup is as good with it.

    Args:
      members: the best first, by the same value. They may be read one by one: the mean so far and
        two trees are held.
      finish: makes of a mean what is evaluated, as with batch statistics of its own.
      value: of a finished tree on the validation split; NaN is worse than any other.
      more_is_better: what a good value is.

    Raises:
      ValueError: there are no members.
    """
    sign = 1 if more_is_better else -1
    mean, kept, best, finished = None, [], -math.inf, None
    for place, tree in enumerate(members):
        trial = tree if mean is None else _with(mean, len(kept), tree)
        done = finish(trial)
        found = sign * value(done)
        if mean is None or found >= best:
            best = -math.inf if math.isnan(found) else found
            mean, finished = trial, done
            kept.append(place)
    if mean is None:
        raise ValueError("no members to average")
    return Soup(finished, tuple(kept))


def _with(mean: Tree, count: int, tree: Tree) -> Tree:
    """The mean of `count` trees with one more."""
    return jax.tree.map(lambda old, new: old + (new - old) / (count + 1), mean, tree)
