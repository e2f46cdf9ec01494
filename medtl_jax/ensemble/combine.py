"""Rules that put the members' scores together without anything fitted to labels.

Scores of m members are float64 `[m, n, k]`, of a mask's pixels `[m, h, w, k]`; what comes back has
no member axis. Probabilities stay probabilities: those of the classes of an image sum to 1.
"""

import numpy as np
from scipy import special, stats

from medtl_jax.metrics.classification import EPSILON
from medtl_jax.metrics.multilabel import THRESHOLD


def weighted_mean(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the mean of the members' scores; `weights` `[m]` sum to 1."""
    return np.tensordot(weights, scores, axes=1)


def logit_mean(task: str, scores: np.ndarray) -> np.ndarray:
    """Returns the probabilities of the members' mean logit.

    Logits are log-probabilities but for a constant, so of classes this is the normalised geometric
    mean; of findings each log-odds is averaged. Probabilities count as at least `EPSILON`, as in
    the NLL: no member rules a class out alone.
    """
    if task == "multilabel":
        return special.expit(log_odds(scores).mean(axis=0))
    return special.softmax(log_probabilities(scores).mean(axis=0), axis=-1)


def log_odds(probability: np.ndarray) -> np.ndarray:
    """Returns log p / (1 - p) of probabilities kept `EPSILON` away from 0 and 1."""
    return special.logit(np.clip(probability, EPSILON, 1 - EPSILON))


def log_probabilities(probability: np.ndarray) -> np.ndarray:
    """Returns log p of probabilities that count as at least `EPSILON`."""
    return np.log(np.maximum(probability, EPSILON))


def vote(task: str, scores: np.ndarray) -> np.ndarray:
    """Returns the share of the votes: a member votes for its most probable class.

    Where several classes lead with as many votes, the mean probability has one more vote, for the
    likeliest of them; so the argmax is the majority's class. Of a finding a member votes present
    where its probability exceeds 0.5, and the mean likewise where the members are split evenly.
    """
    count, mean = len(scores), scores.mean(axis=0)
    if task == "multilabel":
        votes = (scores > THRESHOLD).sum(axis=0)
        tied = 2 * votes == count
        return (votes + (tied & (mean > THRESHOLD))) / (count + tied)
    ballots = np.eye(scores.shape[-1])
    votes = sum(ballots[member.argmax(axis=-1)] for member in scores)
    leading = votes == votes.max(axis=-1, keepdims=True)
    tied = leading.sum(axis=-1, keepdims=True) > 1
    casting = ballots[np.where(leading, mean, -1.0).argmax(axis=-1)]
    return (votes + tied * casting) / (count + tied)


def rank_mean(task: str, scores: np.ndarray) -> np.ndarray:
    """Returns the mean rank of each image among all n, in 0..1; of two classes `[1 - r, r]`.

    Ranks `(rank - 1/2) / n`, of ties their mean, are averaged over the members, for each finding or
    for class 1 of two. They say nothing about where to draw the line, so the mean rank is stretched
    on either side of a border that goes to 0.5: as many images lie above it as the members call
    present on average. The order, and with it the AUC, is that of the plain mean rank. This is no
    probability, and it depends on the other images of the set: one image has no rank.

    Args:
      task: `multilabel`, or `classify` with two classes.
      scores: `[m, n, k]`, the whole set that is to be ranked.
    """
    columns = scores if task == "multilabel" else scores[..., 1:]
    n = columns.shape[1]
    place = ((stats.rankdata(columns, axis=1) - 0.5) / n).mean(axis=0)
    called = np.rint((columns > THRESHOLD).mean(axis=(0, 1)) * n).astype(np.int64)
    for j, count in enumerate(called):
        place[:, j] = _stretched(place[:, j], _border(place[:, j], count))
    return place if task == "multilabel" else np.concatenate([1 - place, place], axis=1)


def _border(place: np.ndarray, above: int) -> float:
    """The middle between the `above` highest of `place` `[n]`, in 0..1, and the others."""
    ends = np.concatenate([[0.0], np.sort(place), [1.0]])
    n = len(place)
    if above in (0, n):
        return 1.0 if above == 0 else 0.0
    return float(ends[n - above] + ends[n - above + 1]) / 2


def _stretched(place: np.ndarray, border: float) -> np.ndarray:
    """0..border to 0..0.5 and border..1 to 0.5..1, both linearly."""
    below = place <= border
    span = np.where(below, border, 1 - border)
    return np.where(below, 0.5 * place / span, 1 - 0.5 * (1 - place) / span)
