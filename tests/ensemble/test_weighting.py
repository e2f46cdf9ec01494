import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from medtl_jax.ensemble.weighting import greedy_weights, least_squares_weights, likelihood_weights


def test_likelihood_by_hand():
    # The mean log of w and 1 - w, 3 to 1, has its maximum at w = 3/4.
    likelihood = np.array([[1, 1e-7]] * 3 + [[1e-7, 1]])
    np.testing.assert_allclose(likelihood_weights(likelihood), [0.75, 0.25], atol=1e-5)
    # A member that is worse everywhere has no weight.
    worse = np.stack([[0.9, 0.5, 0.7], [0.5, 0.4, 0.1]], axis=1)
    np.testing.assert_allclose(likelihood_weights(worse), [1, 0], atol=1e-6)


@given(st.integers(2, 8), st.integers(2, 200), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_likelihood_is_at_its_optimum(m, n, seed):
    rng = np.random.default_rng(seed)
    likelihood = np.clip(rng.beta(rng.uniform(0.2, 4, m), 1, (n, m)), 1e-7, 1)
    weights = likelihood_weights(likelihood)
    assert weights.min() >= 0 and weights.sum() == pytest.approx(1)
    # max_j mean(p_j / p) - 1 bounds how far the NLL of a mixture is from the lowest one.
    gap = (likelihood / (likelihood @ weights)[:, None]).mean(axis=0).max() - 1
    assert gap < 1e-5


@given(st.integers(2, 6), st.integers(8, 100), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_least_squares_against_nnls(m, n, seed):
    rng = np.random.default_rng(seed)
    target = rng.normal(size=n)
    members = target[:, None] + rng.normal(size=(n, m)) * rng.uniform(0.2, 2, m)
    weights = least_squares_weights(members, target)
    # Non-negative least squares with a row that all but forces the sum to 1.
    rows, ends = np.vstack([members, np.full(m, 1e4)]), np.append(target, 1e4)
    want = optimize.nnls(rows, ends)[0]
    np.testing.assert_allclose(weights, want, atol=1e-3)


def test_members_that_are_alike_share():
    likelihood = np.repeat([[0.5], [0.9]], 3, axis=1)
    np.testing.assert_allclose(likelihood_weights(likelihood), 1 / 3)
    np.testing.assert_allclose(least_squares_weights(likelihood, likelihood[:, 0]), 1 / 3)


def test_greedy_by_hand():
    # Of -log(w) - 3 log(1 - w) over w = c / total: member 1 alone is best of the singles, both
    # together are better, and then member 1 twice more gives 1/4.
    likelihood = np.array([[1, 1e-7]] + [[1e-7, 1]] * 3)
    found = greedy_weights(2, lambda w: -np.log(np.maximum(likelihood @ w, 1e-12)).mean())
    np.testing.assert_allclose(found, [0.25, 0.75])


def test_greedy_selects_with_replacement_towards_the_best_weights():
    best = np.array([0.6, 0.3, 0.1, 0])
    found = greedy_weights(4, lambda w: float(((w - best) ** 2).sum()))
    np.testing.assert_allclose(found, best, atol=0.02)


def test_greedy_keeps_one_of_equal_members():
    np.testing.assert_array_equal(greedy_weights(3, lambda w: 1.0), [1, 0, 0])


def test_sorted_initialisation_escapes_where_one_step_does_not_help():
    # Two of the three sorted members together are worse than one, all three are best.
    def loss(weights):
        return {1: 1.0, 2: 2.0, 3: 0.5}[int((weights > 0).sum())] + weights[0] / 1e3

    assert (greedy_weights(3, loss) > 0).all()
