"""How uncertain an ensemble is, and how much of it is the members' disagreement.

The entropy of the mean prediction (total) is the mean entropy of the members' (expected: what
data of this kind leave open) plus the mutual information of prediction and member (what the
members do not agree on; Depeweg et al. 2018, Smith & Gal 2018). Entropies are in nats.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import special

from medtl_jax.data.catalog import Array
from medtl_jax.ensemble.masks import member_masks
from medtl_jax.metrics.checks import check_probabilities


@dataclasses.dataclass(frozen=True)
class Uncertainty:
    """Entropies in nats, float64 `[...]` each; `total = expected + mutual`.

    Attributes:
      total: of the members' mean probabilities (predictive entropy).
      expected: mean over the members of the entropy of each.
      mutual: mutual information of prediction and member, 0 where all members agree.
    """

    total: np.ndarray
    expected: np.ndarray
    mutual: np.ndarray


def entropies(scores: np.ndarray) -> Uncertainty:
    """Returns the entropies `[...]` of class probabilities `[m, ..., k]` of m members."""
    scores = np.asarray(scores, np.float64)
    total = special.entr(scores.mean(axis=0)).sum(axis=-1)
    expected = special.entr(scores).sum(axis=-1).mean(axis=0)
    # Entropy is concave, so less than 0 is rounding.
    mutual = np.maximum(total - expected, 0)
    return Uncertainty(expected + mutual, expected, mutual)


def image_uncertainty(task: str, scores: np.ndarray | Sequence[Array]) -> Uncertainty:
    """Returns the entropies of each image, `[n]`.

    Of `multilabel` they are means over the findings, of `segment` over the pixels. Masks are read
    image by image.

    Args:
      task: `classify`, `ordinal`, `multilabel` or `segment`; numbers have no entropy, see
        `spread`.
      scores: probabilities `[m, n, k]`, of masks `[m, n, h, w, k]`; or m arrays, one a member.

    Raises:
      ValueError: another task, scores that are no probabilities.
    """
    if task == "segment":
        images = (entropies(member_masks(scores, i)) for i in range(len(scores[0])))
        means = [
            [image.total.mean(), image.expected.mean(), image.mutual.mean()] for image in images
        ]
        return Uncertainty(*np.array(means).T)
    if task not in ("classify", "ordinal", "multilabel"):
        raise ValueError(f"want a task with probabilities, got {task!r}")
    read = np.stack([np.asarray(member[:]) for member in scores]).astype(np.float64)
    check_probabilities(read, sums_to_one=task != "multilabel")
    if task != "multilabel":
        return entropies(read)
    found = entropies(np.stack([1 - read, read], axis=-1))
    parts = (found.total, found.expected, found.mutual)
    return Uncertainty(*(findings.mean(axis=1) for findings in parts))


def spread(scores: np.ndarray | Sequence[Array]) -> np.ndarray:
    """Returns the standard deviation between the members of each number, float64 `[n, k]`.

    It is that of the m members about their mean, in the targets' units.

    Args:
      scores: numbers `[m, n, k]`, or m arrays `[n, k]`.
    """
    return np.stack([np.asarray(member[:], np.float64) for member in scores]).std(axis=0)
