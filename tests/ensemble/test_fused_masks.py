import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from medtl_jax.ensemble import masks
from medtl_jax.ensemble.fusion import fit_fusion
from medtl_jax.ensemble.masks import Disputed, disputed_pixels, pixel_likelihoods, staple
from medtl_jax.errors import UserError
from medtl_jax.metrics.scores import task_scores

# Pixels of a 12 x 12 image by what four members say of them, the first in the highest bit, and
# the foreground's probability by SimpleITK 2.5.7 (STAPLEImageFilter, foreground 1).
_ITK = {
    0: (76, 0), 1: (18, 0), 2: (1, 0), 4: (8, 0), 5: (1, 0), 8: (4, 3e-8), 9: (1, 4.8e-7),
    13: (11, 0.99249394), 14: (7, 0.99943478), 15: (17, 0.99996802),
}  # fmt: skip


def test_staple_equals_simpleitk():
    pattern = np.repeat(list(_ITK), [count for count, _ in _ITK.values()]).reshape(12, 12)
    labels = np.stack([pattern >> bit & 1 for bit in (3, 2, 1, 0)]).astype(np.uint8)
    want = np.repeat([p for _, p in _ITK.values()], [count for count, _ in _ITK.values()])
    found = staple(labels, 2)
    np.testing.assert_allclose(found[..., 1].ravel(), want, atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=-1), 1)


def test_one_step_of_staple_by_hand(monkeypatch):
    # Two members and four pixels: 11, 10, 00, 00. The prior of class 1 is 3/8. Both are right
    # with .99: of 11 class 1 is 3 * .99^2 to 5 * .01^2, of 10 it is 3 to 5.
    monkeypatch.setattr(masks, "_MOST_ITERATIONS", 1)
    labels = np.array([[[1, 1, 0, 0]], [[1, 0, 0, 0]]])
    odds = np.array([3 * 0.99**2 / (5 * 0.01**2), 3 / 5, 3 * 0.01**2 / (5 * 0.99**2)])
    w = (odds / (1 + odds))[[0, 1, 2, 2]]
    # Sensitivity and specificity that follow, and the truth that they give.
    p = [w[:2].sum() / w.sum(), w[0] / w.sum()]
    q = [(1 - w[2:]).sum() / (1 - w).sum(), (1 - w[1:]).sum() / (1 - w).sum()]
    odds = [
        3 / 5 * p[0] * p[1] / ((1 - q[0]) * (1 - q[1])),
        3 / 5 * p[0] * (1 - p[1]) / ((1 - q[0]) * q[1]),
    ]
    found = staple(labels, 2)[0, :2, 1]
    np.testing.assert_allclose(found / (1 - found), odds)


def test_staple_trusts_those_who_agree():
    # Three of five members miss more than half of two objects: then most votes may be theirs.
    rng = np.random.default_rng(0)
    truth = np.zeros((40, 40), int)
    truth[10:20, 10:30], truth[25:35, 5:20] = 1, 2
    missed = rng.random((5, 40, 40)) < np.array([0.02, 0.02, 0.6, 0.6, 0.6])[:, None, None]
    labels = np.where(missed, 0, truth)
    votes = np.eye(3)[labels].sum(axis=0).argmax(axis=-1)
    found = staple(labels, 3).argmax(axis=-1)
    assert (found != truth).mean() < 0.002 < 0.04 < (votes != truth).mean()


@given(st.integers(2, 5), st.integers(2, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_staple_is_a_probability_whatever_the_order(m, k, seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, k, (6, 5))
    labels = np.where(rng.random((m, 6, 5)) < 0.3, rng.integers(0, k, (m, 6, 5)), truth)
    found = staple(labels, k)
    assert found.shape == (6, 5, k) and found.min() >= 0
    np.testing.assert_allclose(found.sum(axis=-1), 1)
    np.testing.assert_allclose(staple(labels[::-1], k), found, atol=1e-4)
    absent = np.setdiff1d(np.arange(k), labels)
    assert (found[..., absent] == 0).all()


def test_members_that_agree_are_believed():
    labels = np.zeros((3, 4, 4), int)
    np.testing.assert_array_equal(staple(labels, 2)[..., 0], 1)
    labels[:, 1:3, 1:3] = 1
    np.testing.assert_allclose(staple(labels, 2).argmax(axis=-1), labels[0])


def random_masks(m=3, n=4, k=3, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, k, (n, 6, 5)).astype(np.uint8)
    logits = 2 * np.eye(k)[target] + rng.normal(0, 1.5, (m, n, 6, 5, k))
    return special.softmax(logits, axis=-1).astype(np.float16), target


def test_dice_of_disputed_pixels_is_the_metric():
    scores, target = random_masks(n=5)
    target[3] = 0  # an image whose classes are only predicted
    disputed = disputed_pixels(scores, target, np.arange(5))
    assert isinstance(disputed, Disputed)
    labels = scores.argmax(axis=-1)
    assert len(disputed.label) == (labels != labels[0]).any(axis=0).sum() < target.size
    for weights in ([1, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]):
        mixed = np.tensordot(weights, scores.astype(np.float64), axes=1)
        want = task_scores("segment", target, mixed, ["b", "x", "y"], surfaces=False)["dice"].value
        assert disputed.dice(np.array(weights)) == pytest.approx(want, abs=1e-12)


def test_greedy_masks_have_the_best_dice_of_a_search():
    scores, target = random_masks(m=3)
    disputed = disputed_pixels(scores, target, np.arange(4))
    found = fit_fusion("greedy", "segment", scores, target).weights
    grid = [np.array(c) / 6 for c in itertools.product(range(7), repeat=3) if sum(c) == 6]
    singles = max(disputed.dice(member) for member in np.eye(3))
    best = max(disputed.dice(weights) for weights in grid)
    assert disputed.dice(found) > singles and disputed.dice(found) > best - 0.02


def test_masks_of_background_alone_have_no_dice():
    scores, target = random_masks()
    with pytest.raises(UserError, match="more than background"):
        disputed_pixels(scores, np.zeros_like(target), np.arange(4))
    with pytest.raises(ValueError, match="targets in"):
        disputed_pixels(scores, target + 1, np.arange(4))


def test_a_sample_of_pixels_is_the_same_for_the_same_seed(monkeypatch):
    scores, target = random_masks()
    everything = pixel_likelihoods(scores, target, np.arange(4), 0)
    want = np.take_along_axis(scores, target[None, ..., None].astype(int), axis=-1).reshape(3, -1).T
    np.testing.assert_array_equal(everything, np.maximum(want, 1e-7))
    monkeypatch.setattr(masks, "MOST_PIXELS", 20)
    some, again, other = (pixel_likelihoods(scores, target, np.arange(4), s) for s in (0, 0, 1))
    assert some.shape == (20, 3)
    np.testing.assert_array_equal(some, again)
    assert not np.array_equal(some, other)
    # Five pixels of each image.
    for image in range(4):
        rows = {tuple(row) for row in everything[30 * image : 30 * image + 30]}
        assert {tuple(row) for row in some[5 * image : 5 * image + 5]} <= rows


class Streamed:
    """A member whose masks are read one at a time, and no other way."""

    def __init__(self, score):
        self._score, self.shape, self.dtype = score, score.shape, score.dtype

    def __len__(self):
        return len(self._score)

    def __getitem__(self, row):
        assert np.ndim(row) == 0
        return self._score[row]


@pytest.mark.parametrize("name", ["mean", "logit", "weighted", "vote", "greedy", "staple"])
def test_masks_are_streamed(name):
    scores, target = random_masks()
    fusion = fit_fusion(name, "segment", [Streamed(member) for member in scores], target)
    found = fusion.apply([Streamed(member) for member in scores])
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, fit_fusion(name, "segment", scores, target).apply(scores))


def test_votes_of_masks_by_hand():
    first = np.array([[[0.9, 0.1], [0.4, 0.6]]])
    second = np.array([[[0.2, 0.8], [0.3, 0.7]]])
    scores = np.stack([first, second])[:, None].astype(np.float32)
    found = fit_fusion("vote", "segment", scores, np.zeros((1, 1, 2), np.uint8)).apply(scores)
    np.testing.assert_allclose(found[0, 0], [[2 / 3, 1 / 3], [0, 1]], atol=1e-6)
