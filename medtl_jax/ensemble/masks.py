"""Masks of several members: read image by image, fused, sampled, and compared with the truth.

Scores are m arrays `[n, h, w, k]` of probabilities, in memory or streamed. Only one image of all
members is held as float64 at a time.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy import special

from medtl_jax.data.catalog import Array
from medtl_jax.errors import UserError
from medtl_jax.metrics.checks import check_labels, check_probabilities
from medtl_jax.metrics.classification import EPSILON
from medtl_jax.metrics.temperature import MOST_PIXELS
from medtl_jax.metrics.weighted import known_mean, ratio

# STAPLE: where the members' confusion matrices begin, the change at which they have converged, and
# the iterations after which they are taken as they are.
_TRUST = 0.99
_CONVERGED = 1e-7
_MOST_ITERATIONS = 2000
_TINY = 1e-300


def member_masks(scores: Sequence[Array], image: int) -> np.ndarray:
    """Returns the probabilities of one image by all members, float64 `[m, h, w, k]`.

    Raises:
      ValueError: they are no probabilities.
    """
    read = np.stack([np.asarray(member[image]) for member in scores]).astype(np.float64)
    check_probabilities(read, sums_to_one=True)
    return read


def fuse_masks(
    scores: Sequence[Array], rows: np.ndarray, combine: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Returns `combine` of each image of `rows`, `[r, h, w, k]` in the dtype of the first member.

    `combine` turns float64 `[m, h, w, k]` into `[h, w, k]`.
    """
    fused = np.empty((len(rows), *scores[0].shape[1:]), scores[0].dtype)
    for place, image in enumerate(rows):
        fused[place] = combine(member_masks(scores, image))
    return fused


def pixel_likelihoods(
    scores: Sequence[Array], target: Array, rows: np.ndarray, seed: int
) -> np.ndarray:
    """Returns the probabilities that the members give the true class of some pixels, `[e, m]`.

    `MOST_PIXELS` pixels are drawn, as many of each image of `rows`, the same ones for the same
    seed and number of images; all of them where there are fewer. Probabilities are at least
    `EPSILON`.
    """
    pixels = int(np.prod(scores[0].shape[1:3]))
    wanted = min(pixels, max(1, MOST_PIXELS // len(rows)))
    found = []
    for image in rows:
        rng = np.random.default_rng((seed, image))
        chosen = np.sort(rng.choice(pixels, wanted, replace=False))
        truth = _truth(target, image, scores[0].shape[-1])[chosen]
        read = member_masks(scores, image).reshape(len(scores), pixels, -1)
        found.append(read[:, chosen, truth].T)
    return np.maximum(np.concatenate(found), EPSILON)


def _truth(target: Array, image: int, k: int) -> np.ndarray:
    """The classes of the pixels of one image, int64 `[h w]`."""
    truth = np.asarray(target[image])
    check_labels(truth, 0, k - 1)
    return truth.ravel().astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Disputed:
    """The pixels whose class depends on the members' weights, and counts of all others.

    Where all members have the same most probable class, every weighted mean has it too.

    Attributes:
      truth: int64 `[r, k]`, pixels of each class in each image.
      called: int64 `[r, k]`, pixels to which all members give the class.
      hits: int64 `[r, k]`, those of them that are right.
      image: int64 `[d]`, image of each disputed pixel.
      label: int64 `[d]`, its class.
      scores: `[m, d, k]`, its probabilities.
    """

    truth: np.ndarray
    called: np.ndarray
    hits: np.ndarray
    image: np.ndarray
    label: np.ndarray
    scores: np.ndarray

    def dice(self, weights: np.ndarray) -> float:
        """Returns the mean Dice of the weighted mean, as `metrics.segmentation` has it.

        It is averaged over the images that have the class in truth or prediction, and then over
        the classes, without the background, that are in any of the true masks.
        """
        mixed = np.zeros(self.scores.shape[1:], np.float32)
        for weight, member in zip(weights, self.scores, strict=True):
            if weight:
                mixed += np.float32(weight) * member
        chosen = mixed.argmax(axis=-1)
        called = self.called + self._counts(chosen, slice(None))
        hits = self.hits + self._counts(chosen, chosen == self.label)
        images = ratio(2.0 * hits, (self.truth + called).astype(np.float64))[:, 1:]
        means = known_mean(images, np.ones((len(images), 1)))[:, 0]
        return float(means[self.truth[:, 1:].any(axis=0)].mean())

    def _counts(self, label: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
        return _table(self.image[rows], label[rows], self.truth.shape)


def _table(image: np.ndarray, label: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """How many pixels of each image have each class, int64 `[r, k]`."""
    return np.bincount(image * shape[1] + label, minlength=shape[0] * shape[1]).reshape(shape)


def disputed_pixels(scores: Sequence[Array], target: Array, rows: np.ndarray) -> Disputed:
    """Returns the disputed pixels of the images of `rows`; no pixel is left out.

    Raises:
      UserError: no true mask has anything but background.
    """
    k = scores[0].shape[-1]
    shape = (len(rows), k)
    counts = np.zeros((3, *shape), np.int64)
    images, labels, kept = [], [], []
    for place, image in enumerate(rows):
        read = member_masks(scores, image).reshape(len(scores), -1, k)
        truth, called = _truth(target, image, k), read.argmax(axis=-1)
        agreed = (called == called[0]).all(axis=0)
        common, right = called[0, agreed], agreed & (called[0] == truth)
        for count, of in zip(counts, (truth, common, truth[right]), strict=True):
            count[place] = np.bincount(of, minlength=k)
        images.append(np.full((~agreed).sum(), place))
        labels.append(truth[~agreed])
        kept.append(read[:, ~agreed].astype(scores[0].dtype))
    if not counts[0, :, 1:].any():
        raise UserError(
            "greedy needs a validation mask with more than background to score Dice; leave greedy "
            "out of ensemble.fusions"
        )
    return Disputed(
        *counts, np.concatenate(images), np.concatenate(labels), np.concatenate(kept, axis=1)
    )


def staple(labels: np.ndarray, k: int) -> np.ndarray:
    """Returns the probability of each class in each pixel of one image, float64 `[h, w, k]`.

    STAPLE, simultaneous truth and performance level estimation (Warfield, Zou & Wells 2004),
    for k classes at once: the truth is hidden, member j says s' where it is s with probability
    theta_j(s', s), and EM alternates between

        w_i(s) ~ prior(s) prod_j theta_j(d_ij, s)          (E step)
        theta_j(s', s) = sum of w_i(s) where d_ij = s', divided by sum of w_i(s)       (M step)

    from members that are right with probability 0.99. The prior is the share of the class in all
    the members' masks of the image. Pixels count as independent (no Markov random field). Pixels
    about which the members say the same have the same probability, so the EM runs over what they
    say, not over pixels. A class that no member has here has probability 0.

    Args:
      labels: integers `[m, h, w]` in 0..k-1, the members' masks.
      k: number of classes.
    """
    count = len(labels)
    said, where, times = _patterns(labels.reshape(count, -1), k)
    # [patterns, m k]: which class each member says, 1 in k.
    votes = np.eye(k)[said.T].reshape(-1, count * k)
    prior = (times @ votes).reshape(count, k).sum(axis=0) / (count * times.sum())
    with np.errstate(divide="ignore"):
        log_prior = np.log(prior)
    theta = np.full((k, k), (1 - _TRUST) / (k - 1))
    np.fill_diagonal(theta, _TRUST)
    theta = np.tile(theta, (count, 1))
    for _ in range(_MOST_ITERATIONS):
        mass = _expected_truth(votes, theta, log_prior) * times[:, None]
        # Of a class that no pixel has, nothing is learnt.
        pixels = mass.sum(axis=0)
        updated = np.where(pixels > 0, votes.T @ mass / np.maximum(pixels, _TINY), theta)
        change, theta = np.abs(updated - theta).max(), updated
        if change < _CONVERGED:
            break
    truth = _expected_truth(votes, theta, log_prior)
    return truth[where].reshape(*labels.shape[1:], k)


def _patterns(labels: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The different columns `[m, patterns]` of labels `[m, pixels]`, which each is, how many."""
    where = labels[0].astype(np.int64)
    # Member by member, so that no number grows as k to the power of m; np.unique over an axis
    # takes much longer.
    for member in labels[1:]:
        where = np.unique(where * k + member, return_inverse=True)[1]
    _, first, where, times = np.unique(
        where, return_index=True, return_inverse=True, return_counts=True
    )
    return labels[:, first], where, times


def _expected_truth(votes: np.ndarray, theta: np.ndarray, log_prior: np.ndarray) -> np.ndarray:
    """Probability of each class where the members say each pattern, `[patterns, k]`."""
    # A member that never said s' where it is s rules s out; log 0 would be NaN times 0.
    return special.softmax(log_prior + votes @ np.log(np.maximum(theta, _TINY)), axis=-1)
