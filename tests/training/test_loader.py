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


def test_draws_are_those_of_earlier_releases():
    wanted = [[1, 4, 0, 5], [6, 3, 4, 0], [2, 1, 6, 3]]
    np.testing.assert_array_equal(training_indices(3, 2, 3, 7, 4), wanted)


grouped = st.lists(st.sampled_from([0, 3, 7]), min_size=1, max_size=40).map(np.array)


@hypothesis.given(grouped, st.integers(0, 2**32))
def test_a_pass_of_the_largest_group_passes_through_the_others_as_often(groups, seed):
    members = {label: np.flatnonzero(groups == label) for label in np.unique(groups)}
    rounds = max(map(len, members.values()))
    found = training_indices(seed, 0, rounds, len(groups), len(members), groups)
    # A row is a round: one example of every group.
    np.testing.assert_array_equal(
        np.sort(groups[found], axis=1), np.tile(np.unique(groups), (rounds, 1))
    )
    for label, own in members.items():
        drawn = found[groups[found] == label]
        whole = rounds // len(own) * len(own)
        passes = np.sort(drawn[:whole].reshape(-1, len(own)), axis=1)
        np.testing.assert_array_equal(passes, np.tile(own, (len(passes), 1)))
        assert len(set(drawn[whole:])) == rounds - whole


@hypothesis.given(
    grouped, st.integers(1, 20), st.integers(0, 2**32), st.integers(0, 30), st.integers(1, 5)
)
def test_any_balanced_step_alone_is_a_slice_of_a_longer_draw(groups, batch, seed, first, steps):
    size = len(groups)
    whole = training_indices(seed, 0, first + steps + 1, size, batch, groups)
    part = training_indices(seed, first, steps, size, batch, groups)
    assert part.shape == (steps, batch) and part.dtype == np.int32
    np.testing.assert_array_equal(part, whole[first : first + steps])


def test_balanced_orders_are_random():
    groups = np.repeat([0, 1], [90, 10])
    found = training_indices(0, 0, 1, 100, 400, groups)[0]
    other = training_indices(1, 0, 1, 100, 400, groups)[0]
    assert (found != other).any()
    # Which group comes first in a round is a fair coin; the rare group's passes differ.
    assert 70 < groups[found[::2]].sum() < 130
    rare = found[groups[found] == 1].reshape(-1, 10)
    assert len({row.tobytes() for row in rare}) == 20
    # The two groups' permutations have nothing to do with each other.
    equal = np.repeat([0, 1], 50)
    both = training_indices(0, 0, 1, 100, 100, equal)[0]
    assert (both[equal[both] == 0] != both[equal[both] == 1] - 50).any()


def test_groups_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"want groups \[4\], got \(3,\)"):
        training_indices(0, 0, 1, 4, 2, np.zeros(3, int))


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
