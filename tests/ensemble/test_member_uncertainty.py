import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from medtl_jax.ensemble.uncertainty import entropies, image_uncertainty, spread


def test_by_hand():
    # Two sure members that disagree know nothing together, all of it mutual information; two
    # that agree on one half each have the entropy of a coin, none of it mutual.
    scores = np.array([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])
    found = image_uncertainty("classify", scores)
    np.testing.assert_allclose(found.total, math.log(2))
    np.testing.assert_allclose(found.expected, [0, math.log(2)])
    np.testing.assert_allclose(found.mutual, [math.log(2), 0])


@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_mutual_information_is_the_divergence_from_the_mean(m, k, seed):
    scores = np.random.default_rng(seed).dirichlet(np.full(k, 0.5), (m, 4))
    found = entropies(scores)
    np.testing.assert_allclose(found.total, stats.entropy(scores.mean(axis=0), axis=-1))
    divergence = special.rel_entr(scores, scores.mean(axis=0)).sum(axis=-1).mean(axis=0)
    np.testing.assert_allclose(found.mutual, divergence, atol=1e-12)
    np.testing.assert_allclose(found.total, found.expected + found.mutual)
    assert (found.mutual >= 0).all() and (found.total <= math.log(k) + 1e-9).all()


def test_findings_are_averaged():
    scores = np.array([[[0.5, 1.0]], [[0.5, 0.0]]], np.float32)
    found = image_uncertainty("multilabel", scores)
    np.testing.assert_allclose(found.total, [math.log(2)])
    np.testing.assert_allclose(found.expected, [math.log(2) / 2])
    np.testing.assert_allclose(found.mutual, [math.log(2) / 2])


def test_pixels_are_averaged_and_members_may_come_one_by_one():
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(3), (2, 4, 6, 5)).astype(np.float16)
    found = image_uncertainty("segment", list(scores))
    pixels = entropies(scores.astype(np.float64).reshape(2, 4, 30, 3))
    for name in ("total", "expected", "mutual"):
        np.testing.assert_allclose(getattr(found, name), getattr(pixels, name).mean(axis=1))


def test_numbers_have_a_spread():
    scores = np.array([[[1.0, 10.0]], [[3.0, 10.0]]])
    np.testing.assert_allclose(spread(scores), [[1, 0]])
    with pytest.raises(ValueError, match="task with probabilities"):
        image_uncertainty("regress", scores)
    with pytest.raises(ValueError, match="want probabilities"):
        image_uncertainty("ordinal", scores)
