"""Soups: the means are those of NumPy, and the greedy one is that of the paper's algorithm."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medtl_jax.ensemble.soup import greedy_soup, uniform_soup

FLOATS = st.floats(-10, 10, width=32)


def tree(values) -> dict:
    return {"params": {"head": {"kernel": jnp.asarray(values, jnp.float32)}}}


def kernel(found) -> np.ndarray:
    return np.asarray(found["params"]["head"]["kernel"])


@given(arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=FLOATS))
def test_the_uniform_soup_is_the_mean(values):
    found = uniform_soup(iter(map(tree, values)))
    np.testing.assert_allclose(kernel(found), values.mean(axis=0), atol=2e-5)


def worked(values: list[float], target: float, more_is_better: bool = False):
    """The greedy soup of scalar networks whose value is their distance to the target."""
    sign = -1 if more_is_better else 1
    return greedy_soup(
        map(tree, values),
        finish=lambda found: found,
        value=lambda found: sign * abs(float(kernel(found)) - target),
        more_is_better=more_is_better,
    )


@pytest.mark.parametrize("more_is_better", [False, True])
def test_the_greedy_soup_keeps_what_does_not_harm(more_is_better):
    # By hand: 1 is 1 away from 2. With 4 the mean is 2.5, half away: kept. With 10 it would be 5:
    # left out. With 1 it is 2 exactly: kept.
    found = worked([1, 4, 10, 1], 2, more_is_better)
    assert found.members == (0, 1, 3)
    np.testing.assert_allclose(kernel(found.variables), 2.0, rtol=1e-6)


def test_an_equal_value_is_kept_and_a_worse_one_is_not():
    assert worked([3, 3], 2).members == (0, 1)
    assert worked([3, 3.5], 2).members == (0,)


def test_what_is_undefined_is_worse_than_all_else():
    values = iter([math.nan, 0.4, math.nan, 0.3])
    found = greedy_soup(
        map(tree, [1.0, 2.0, 3.0, 4.0]), lambda soup: soup, lambda soup: next(values), False
    )
    assert found.members == (0, 1, 3)


def test_what_is_valued_and_returned_is_finished():
    seen = []

    def finish(found):
        return tree(kernel(found) + 100)

    def value(found):
        seen.append(float(kernel(found)))
        return 0.0

    found = greedy_soup(map(tree, [1.0, 3.0]), finish, value, True)
    assert seen == [101, 102] and float(kernel(found.variables)) == 102


def test_no_members_are_refused():
    with pytest.raises(ValueError, match="no members"):
        uniform_soup([])
    with pytest.raises(ValueError, match="no members"):
        greedy_soup([], lambda tree: tree, lambda tree: 0.0, True)
