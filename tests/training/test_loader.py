"""The order of training images, and that evaluation sees each image once."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from medtl_jax.data.loader import evaluation_batches, steps_per_epoch, training_indices

sizes = st.integers(1, 60), st.integers(1, 40), st.integers(0, 2**32)


@hypothesis.given(*sizes)
def test_each_image_comes_exactly_once_a_pass(examples, batch_size, seed):
    steps = -(-3 * examples // batch_size)
    found = training_indices(seed, 0, steps, examples, batch_size)
    assert found.shape == (steps, batch_size) and found.dtype == np.int32
    stream = found.ravel()[: 3 * examples].reshape(3, examples)
    np.testing.assert_array_equal(np.sort(stream, axis=1), np.tile(np.arange(examples), (3, 1)))


@hypothesis.given(*sizes, st.integers(0, 30), st.integers(1, 5))
def test_any_step_alone_is_a_slice_of_a_longer_draw(examples, batch_size, seed, first, steps):
    whole = training_indices(seed, 0, first + steps + 1, examples, batch_size)
    part = training_indices(seed, first, steps, examples, batch_size)
    np.testing.assert_array_equal(part, whole[first : first + steps])


def test_passes_and_seeds_have_orders_of_their_own():
    first, second = training_indices(0, 0, 2, 50, 50)
    assert (first != second).any() and (first != np.arange(50)).any()
    assert (training_indices(1, 0, 1, 50, 50)[0] != first).any()


@pytest.mark.parametrize(
    ("examples", "batch_size", "expected"), [(48, 16, 3), (50, 16, 3), (56, 16, 4), (5, 16, 1)]
)
def test_steps_per_epoch_by_hand(examples, batch_size, expected):
    assert steps_per_epoch(examples, batch_size) == expected


def test_evaluation_batches_by_hand():
    found = evaluation_batches(5, 3)
    np.testing.assert_array_equal(found.indices, [[0, 1, 2], [3, 4, 0]])
    np.testing.assert_array_equal(found.mask, [[True, True, True], [True, True, False]])


@hypothesis.given(st.integers(1, 200), st.integers(1, 70))
def test_evaluation_covers_each_image_once_in_order(examples, batch_size):
    found = evaluation_batches(examples, batch_size)
    assert found.indices.shape == found.mask.shape == (-(-examples // batch_size), batch_size)
    np.testing.assert_array_equal(found.indices[found.mask], np.arange(examples))
    assert (found.indices < examples).all()


def test_an_empty_split_cannot_be_evaluated():
    with pytest.raises(ValueError, match="an empty split"):
        evaluation_batches(0, 4)
