"""Augmentation: hand-checked transforms, and draws that depend on seed and position alone."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from medtl_jax.augment import geometry, intensity
from medtl_jax.augment.policy import make_augment
from medtl_jax.errors import UserError

SQUARE = np.arange(16, dtype=np.float32).reshape(4, 4, 1)
KEYS = jax.random.split(jax.random.key(0), 200)
OFF = {"flip_horizontal": 0.0, "flip_vertical": 0.0, "shift": 0.0, "brightness": 0.0}
OFF |= {"contrast": 0.0}
ALL = {"flip_horizontal": 0.5, "flip_vertical": 0.5, "shift": 0.25, "brightness": 0.2}
ALL |= {"contrast": 0.3}


def drawn(function, image):
    """The results over all keys, `[200, h, w, c]`."""
    return np.asarray(jax.jit(jax.vmap(lambda key: function(key, jnp.asarray(image))))(KEYS))


@pytest.mark.parametrize(
    ("axis", "expected"),
    [(0, [[3, 4], [1, 2]]), (1, [[2, 1], [4, 3]])],
    ids=["vertical", "horizontal"],
)
def test_flip_by_hand(axis, expected):
    image = jnp.array([[1.0, 2.0], [3.0, 4.0]])[..., None]
    found = geometry.flip(jax.random.key(0), image, 1.0, axis)
    np.testing.assert_array_equal(found[..., 0], expected)


@pytest.mark.parametrize(
    ("probability", "low", "high"), [(0.5, 70, 130), (0.1, 5, 40), (0.0, 0, 0)]
)
def test_flip_happens_with_its_probability(probability, low, high):
    found = drawn(lambda key, x: geometry.flip(key, x, probability, 1), SQUARE)
    flipped = (found == SQUARE[:, ::-1]).all((1, 2, 3))
    assert (flipped | (found == SQUARE).all((1, 2, 3))).all()
    assert low <= flipped.sum() <= high


def test_shift_by_hand():
    found = drawn(lambda key, x: geometry.shift(key, x, 0.25), SQUARE)[..., 0]
    # One pixel at most in each direction, the edge repeated: nine images, among them these two.
    right_up = [[4, 4, 5, 6], [8, 8, 9, 10], [12, 12, 13, 14], [12, 12, 13, 14]]
    down = [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    expected = set()
    for row in (-1, 0, 1):
        for column in (-1, 0, 1):
            rows = np.clip(np.arange(4) - row, 0, 3)
            columns = np.clip(np.arange(4) - column, 0, 3)
            expected.add(SQUARE[..., 0][np.ix_(rows, columns)].tobytes())
    assert {np.array(image, np.float32).tobytes() for image in (right_up, down)} <= expected
    assert {image.tobytes() for image in found} == expected


def test_brightness_adds_one_draw_to_every_pixel():
    image = np.full((3, 3, 1), 100.0, np.float32)
    image[0, 0] = 120.0
    offset = drawn(lambda key, x: intensity.brightness(key, x, 0.2), image) - image
    np.testing.assert_allclose(offset, np.broadcast_to(offset[:, :1, :1], offset.shape), atol=1e-4)
    assert -51.0 <= offset.min() < -40 and 40 < offset.max() <= 51.0
    assert abs(offset.mean()) < 8


def test_contrast_stretches_about_the_mean():
    image = np.array([[50.0, 150.0]], np.float32)[..., None]
    found = drawn(lambda key, x: intensity.contrast(key, x, 0.2), image)
    np.testing.assert_allclose(found.mean((1, 2, 3)), 100.0, rtol=1e-5)
    factor = (found[:, 0, 1, 0] - 100.0) / 50.0
    assert 0.8 <= factor.min() < 0.84 and 1.16 < factor.max() <= 1.2


@pytest.mark.parametrize("name", ["brightness", "contrast"])
def test_intensities_are_clipped_to_the_range(name):
    image = np.array([[0.0, 255.0]], np.float32)[..., None]
    found = drawn(lambda key, x: getattr(intensity, name)(key, x, 1.0), image)
    assert found.min() == 0.0 and found.max() == 255.0


@pytest.mark.parametrize(
    "function",
    [
        lambda key, x: geometry.flip(key, x, 0.0, 0),
        lambda key, x: geometry.shift(key, x, 0.0),
        lambda key, x: intensity.brightness(key, x, 0.0),
        lambda key, x: intensity.contrast(key, x, 0.0),
    ],
    ids=["flip", "shift", "brightness", "contrast"],
)
def test_strength_zero_is_the_identity(function):
    found = drawn(function, SQUARE)
    np.testing.assert_allclose(found, np.broadcast_to(SQUARE, found.shape), atol=1e-5)


def images(n, channels=3):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, 256, (n, 8, 8, channels), np.uint8))


# What the release without masks made of FOUR with the key 7, by the first three transforms at
# 0.5, 0.5 and 0.4, and by all five (brightness 0.2, contrast 0.3).
FOUR = (np.arange(48) * 37 % 256).astype(np.uint8).reshape(4, 4, 3, 1)
MOVED = [
    [[77, 77, 114], [77, 77, 114], [77, 77, 114], [222, 222, 3]],
    [[83, 83, 46], [83, 83, 46], [228, 228, 191], [117, 117, 80]],
    [[157, 194, 194], [157, 194, 194], [12, 49, 49], [123, 160, 160]],
    [[200, 163, 163], [55, 18, 18], [166, 129, 129], [166, 129, 129]],
]
FIRST_AND_LAST_PIXEL = [[91.951, 33.019], [67.953, 64.356], [182.656, 186.175], [183.415, 122.053]]


@pytest.mark.parametrize("with_masks", [False, True])
def test_draws_are_those_of_earlier_releases(with_masks):
    geometric = {"flip_horizontal": 0.5, "flip_vertical": 0.5, "shift": 0.4}
    full, masks = {**geometric, "brightness": 0.2, "contrast": 0.3}, FOUR[..., 0]
    for policy in (geometric, full):
        augment = jax.jit(make_augment({**OFF, **policy}))
        found, moved = augment(jax.random.key(7), FOUR, masks if with_masks else None)
        if policy is geometric:
            np.testing.assert_array_equal(found[..., 0], MOVED)
        else:
            ends = np.asarray(found).reshape(4, -1)[:, [0, -1]]
            np.testing.assert_allclose(ends, FIRST_AND_LAST_PIXEL, atol=2e-3)
        if with_masks:
            np.testing.assert_array_equal(moved, MOVED)
        else:
            assert moved is None


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_masks_move_with_their_images_and_keep_their_values(dtype):
    """The image is the mask: without intensities both come out the same."""
    masks = np.random.default_rng(1).integers(0, 3, (32, 8, 8)).astype(dtype)
    policy = {**ALL, "brightness": 0.0, "contrast": 0.0}
    found, moved = jax.jit(make_augment(policy))(jax.random.key(3), masks[..., None], masks)
    assert moved.dtype == dtype and moved.shape == masks.shape
    np.testing.assert_array_equal(found[..., 0], np.asarray(moved, np.float32))
    assert (np.asarray(moved) != masks).any((1, 2)).sum() > 20


def test_intensities_leave_masks_alone():
    masks = np.random.default_rng(1).integers(0, 3, (4, 8, 8), np.uint8)
    augment = jax.jit(make_augment({**OFF, "brightness": 0.2, "contrast": 0.3}))
    found, kept = augment(jax.random.key(3), images(4), masks)
    np.testing.assert_array_equal(kept, masks)
    assert kept.dtype == np.uint8 and (np.asarray(found) != np.asarray(images(4))).any()


@pytest.mark.parametrize("policy", [OFF, ALL], ids=["off", "all"])
def test_masks_of_another_size_are_refused(policy):
    with pytest.raises(ValueError, match=r"masks \(2, 8, 7\) are not of the size of images"):
        make_augment(policy)(jax.random.key(0), images(2), jnp.zeros((2, 8, 7), jnp.uint8))


def test_no_policy_gives_the_bytes_as_floats():
    found, _ = make_augment(OFF)(jax.random.key(0), images(2))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.asarray(images(2), np.float32))


@pytest.mark.parametrize("channels", [1, 3])
def test_full_policy_keeps_shape_and_range(channels):
    found, _ = jax.jit(make_augment(ALL))(jax.random.key(0), images(16, channels))
    assert found.shape == (16, 8, 8, channels) and found.dtype == jnp.float32
    assert float(found.min()) >= 0.0 and float(found.max()) <= 255.0
    changed = np.abs(np.asarray(found) - np.asarray(images(16, channels), np.float32))
    assert (changed.max((1, 2, 3)) > 1).all()


def test_the_batch_size_changes_no_draw():
    augment, key = jax.jit(make_augment(ALL)), jax.random.key(5)
    large, _ = augment(key, images(64))
    np.testing.assert_allclose(large[:1], augment(key, images(64)[:1])[0], atol=1e-4)
    np.testing.assert_allclose(large[:7], augment(key, images(64)[:7])[0], atol=1e-4)


def test_another_transform_changes_no_draw():
    def flipped(**others):
        augment = jax.jit(make_augment({**OFF, "flip_horizontal": 0.5, **others}))
        column = augment(jax.random.key(2), ramp)[0].mean((1, 3))
        return np.asarray(column[:, 0] > column[:, -1])

    ramp = jnp.broadcast_to(jnp.arange(0, 160, 20, dtype=jnp.uint8)[:, None], (32, 8, 8, 1))
    alone = flipped()
    assert 0 < alone.sum() < 32
    np.testing.assert_array_equal(alone, flipped(brightness=0.1, contrast=0.1))


def test_examples_and_keys_draw_independently():
    same = jnp.broadcast_to(images(1), (8, 8, 8, 3))
    augment = jax.jit(make_augment(ALL))
    found = [np.asarray(augment(jax.random.key(seed), same)[0]) for seed in (0, 1)]
    assert len({image.tobytes() for batch in found for image in batch}) == 16


@hypothesis.given(
    st.sampled_from(sorted(OFF)),
    st.floats().filter(lambda value: not 0 <= value <= 1),
)
def test_a_strength_outside_the_range_is_refused(name, strength):
    with pytest.raises(UserError, match=rf"augment\.{name}=.* must lie in 0..1"):
        make_augment({**OFF, name: strength})
