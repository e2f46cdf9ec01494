"""The policy: what it composes, and draws that depend on seed and position alone."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from configs import default
from medtl_jax.augment import geometry
from medtl_jax.augment.policy import (
    LIMITS,
    active_transforms,
    check_channels,
    drawing_settings,
    make_augment,
    make_placements,
)
from medtl_jax.augment.presets import PRESETS, TRANSFORMS
from medtl_jax.errors import UserError

OFF = dict.fromkeys(TRANSFORMS, 0.0)
EXACT = {"flip_horizontal": 0.5, "flip_vertical": 0.5, "quarter_turns": 0.75, "shift": 0.25}
WARPED = {**EXACT, "rotate": 20.0, "scale": 0.2, "shear": 10.0, "crop": 0.3, "elastic": 0.03}
INTENSITIES = {"brightness": 0.2, "contrast": 0.3, "gamma": 0.2, "noise": 0.05, "cutout": 0.3}
ALL = {**WARPED, **INTENSITIES}


def images(n, channels=3, side=8):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, 256, (n, side, side, channels), np.uint8))


@pytest.fixture(scope="module")
def full():
    """The whole policy, compiled once for each form of its arguments."""
    return jax.jit(make_augment(ALL))


def augmented(policy, n=8, channels=1, key=0):
    return np.asarray(jax.jit(make_augment(policy))(jax.random.key(key), images(n, channels))[0])


# What the release before masks made of FOUR with the key 7, by the first three transforms at
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


def test_every_transform_has_a_limit_and_a_key_in_the_config():
    own = default.get_config().augment.to_dict()
    mixing = {"preset", "mixup", "cutmix", "randaugment", "randaugment_strength"}
    assert set(TRANSFORMS) == set(LIMITS) == own.keys() - mixing
    assert active_transforms(own) == {name: own[name] for name in TRANSFORMS if own[name]}


# ---- masks and boxes ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_masks_move_with_their_images_and_keep_their_values(dtype):
    """The image is the mask: without intensities both come out the same."""
    masks = np.random.default_rng(1).integers(0, 3, (32, 8, 8)).astype(dtype)
    found, moved = jax.jit(make_augment(EXACT))(jax.random.key(3), masks[..., None], masks)
    assert moved.dtype == dtype and moved.shape == masks.shape
    np.testing.assert_array_equal(found[..., 0], np.asarray(moved, np.float32))
    assert (np.asarray(moved) != masks).any((1, 2)).sum() > 20


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("randaugment", [0, 2])
def test_masks_are_warped_as_their_images_are(axis, randaugment):
    """The image holds the coordinate of each pixel, the mask the same as a class."""
    side, n = 24, 16
    grid = np.broadcast_to(np.indices((side, side))[axis], (n, side, side)).astype(np.uint8)
    augment = jax.jit(make_augment({**WARPED, "randaugment": randaugment}))
    found, moved = augment(jax.random.key(1), grid[..., None], grid)
    # What lies between two pixels is a mean of their coordinates; the mask takes the nearer one.
    assert np.abs(np.asarray(found)[..., 0] - np.asarray(moved)).max() <= 0.5 + 1e-3
    assert (np.asarray(moved) != grid).any((1, 2)).all()


def test_boxes_move_with_their_images():
    """Around a rectangle of ones the box stays around it, whatever happens to the image."""
    side, n, box = 32, 16, (10.0, 12.0, 18.0, 24.0)
    masks = np.zeros((n, side, side), np.uint8)
    masks[:, 10:18, 12:24] = 1
    key, policy = jax.random.key(5), {**EXACT, "shift": 0.1}
    _, moved = jax.jit(make_augment(policy))(key, masks[..., None], masks)
    placed = jax.jit(lambda key: make_placements(policy)(key, n, (side, side)))(key)
    boxes = jnp.broadcast_to(jnp.array([[box]]), (n, 1, 4))
    move = jax.jit(jax.vmap(lambda placed, box: geometry.move_boxes(placed, box, (side, side))))
    boxes = move(placed, boxes)[:, 0]
    for mask, found in zip(np.asarray(moved), np.asarray(boxes), strict=True):
        rows, columns = (np.flatnonzero(mask.any(other)) for other in (1, 0))
        wanted = [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]
        np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_intensities_leave_masks_alone():
    masks = np.random.default_rng(1).integers(0, 3, (4, 8, 8), np.uint8)
    augment = jax.jit(make_augment(INTENSITIES))
    found, kept = augment(jax.random.key(3), images(4), masks)
    np.testing.assert_array_equal(kept, masks)
    assert kept.dtype == np.uint8 and (np.asarray(found) != np.asarray(images(4))).any((1, 2)).all()


@pytest.mark.parametrize("policy", [OFF, ALL], ids=["off", "all"])
def test_masks_of_another_size_are_refused(policy):
    with pytest.raises(ValueError, match=r"masks \(2, 8, 7\) are not of the size of images"):
        make_augment(policy)(jax.random.key(0), images(2), jnp.zeros((2, 8, 7), jnp.uint8))


# ---- one draw an example -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", [{}, OFF], ids=["empty", "zeros"])
def test_no_policy_gives_the_bytes_as_floats(policy):
    found, _ = make_augment(policy)(jax.random.key(0), images(2))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.asarray(images(2), np.float32))
    program = jax.make_jaxpr(make_augment(policy))(jax.random.key(0), images(2))
    assert [step.primitive.name for step in program.eqns] == ["convert_element_type"]


def test_the_full_policy_keeps_shape_and_range(full):
    found = np.asarray(full(jax.random.key(5), images(64))[0])
    assert found.shape == (64, 8, 8, 3) and found.dtype == np.float32
    assert found.min() >= 0.0 and found.max() <= 255.0
    changed = np.abs(found - np.asarray(images(64), np.float32))
    assert (changed.max((1, 2, 3)) > 1).all()


def test_neither_the_batch_size_nor_a_mask_changes_a_draw(full):
    key, masks = jax.random.key(5), np.asarray(images(64, 1)[..., 0])
    large, _ = full(key, images(64))
    one, moved = full(key, images(64)[:1], masks[:1])
    np.testing.assert_allclose(large[:1], one, atol=1e-3)
    assert (np.asarray(moved) != masks[:1]).any()


def test_the_batch_size_changes_no_draw_of_randaugment():
    policy = {"rotate": 20.0, "shift": 0.25, "brightness": 0.2, "randaugment": 2}
    augment, key = jax.jit(make_augment(policy)), jax.random.key(5)
    masks = np.asarray(images(64, 1)[..., 0])
    large, moved = augment(key, images(64, 1), masks)
    one, one_moved = augment(key, images(64, 1)[:1], masks[:1])
    np.testing.assert_allclose(large[:1], one, atol=1e-3)
    np.testing.assert_array_equal(moved[:1], one_moved)


def test_another_transform_changes_no_draw():
    def flipped(**others):
        augment = jax.jit(make_augment({**OFF, "flip_horizontal": 0.5, **others}))
        column = augment(jax.random.key(2), ramp)[0].mean((1, 3))
        return np.asarray(column[:, 0] > column[:, -1])

    ramp = jnp.broadcast_to(jnp.arange(0, 160, 20, dtype=jnp.uint8)[:, None], (32, 8, 8, 1))
    alone = flipped()
    assert 0 < alone.sum() < 32
    np.testing.assert_array_equal(alone, flipped(brightness=0.1, contrast=0.1))
    np.testing.assert_array_equal(alone, flipped(rotate=5.0, shift=0.1, noise=0.01))


def test_examples_and_keys_draw_independently(full):
    same = jnp.broadcast_to(images(1), (64, 8, 8, 3))
    found = [np.asarray(full(jax.random.key(seed), same)[0]) for seed in (0, 1)]
    assert len({image.tobytes() for batch in found for image in batch}) == 128


# ---- RandAugment -------------------------------------------------------------------------------

THREE = {"shift": 0.25, "brightness": 0.2, "noise": 0.1}


def applied(found, singles):
    """For each image the names of the policies that it came out of."""
    return [
        {name for name, images in singles.items() if np.allclose(image, images[i], atol=1e-3)}
        for i, image in enumerate(found)
    ]


def test_one_of_the_transforms_is_drawn_for_each_image():
    singles = {name: augmented({name: strength}, 96) for name, strength in THREE.items()}
    found = applied(augmented({**THREE, "randaugment": 1}, 96), singles)
    # A shift by nothing is the one draw that cannot be told from another.
    assert all(len(names) == 1 for names in found)
    counts = {name: sum(name in names for names in found) for name in THREE}
    assert min(counts.values()) > 18, counts


def test_two_are_drawn_without_replacement():
    pairs = {
        left + right: augmented({left: THREE[left], right: THREE[right]}, 48)
        for left, right in (("shift", "brightness"), ("shift", "noise"), ("brightness", "noise"))
    }
    found = applied(augmented({**THREE, "randaugment": 2}, 48), pairs)
    assert all(len(names) == 1 for names in found) and len(set.union(*found)) == 3


def test_all_of_them_are_the_whole_policy_at_the_magnitude():
    np.testing.assert_allclose(
        augmented({**THREE, "randaugment": 3, "randaugment_strength": 0.5}),
        augmented({name: strength / 2 for name, strength in THREE.items()}),
        atol=1e-3,
    )


def test_flips_turns_and_crops_are_not_drawn_among():
    always = {"flip_horizontal": 1.0, "brightness": 0.2}
    found = augmented({**always, "randaugment": 1, "randaugment_strength": 0.5})
    np.testing.assert_allclose(found, augmented({**always, "brightness": 0.1}), atol=1e-3)
    # A probability is no strength that a magnitude could scale.
    on = active_transforms({"equalize": 0.8, "randaugment": 1, "randaugment_strength": 2.0})
    assert on == {"equalize": 0.8}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"randaugment": 4}, "randaugment=4 must be .* are 3: shift, brightness, noise"),
        ({"randaugment": -1}, "randaugment=-1 must be"),
        ({"randaugment": 1, "randaugment_strength": 0.0}, "strength=0.0 must be more than 0"),
        ({"randaugment": 1, "randaugment_strength": 11.0}, "strength=11.0 must be .* at most 10"),
        (
            {"randaugment": 1, "randaugment_strength": 6.0},
            r"randaugment_strength=6.0 times augment.shift=0.25 is above 1;",
        ),
    ],
)
def test_what_randaugment_cannot_do_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        make_augment({**THREE, **settings})
    with pytest.raises(UserError, match="draw from, which are 0: none; set their strengths"):
        make_augment({"flip_horizontal": 0.5, "randaugment": 1})


# ---- values ------------------------------------------------------------------------------------


@hypothesis.given(st.sampled_from(sorted(LIMITS)), st.floats())
def test_a_strength_outside_its_range_is_refused(name, strength):
    hypothesis.assume(not 0 <= strength <= LIMITS[name])
    with pytest.raises(UserError, match=rf"augment\.{name}=.* must lie in 0..{LIMITS[name]:g}"):
        make_augment({**OFF, name: strength})


def test_colours_are_refused_on_grey_images():
    check_channels(PRESETS["xray"].strengths, 1)
    check_channels(PRESETS["histology"].strengths, 3)
    with pytest.raises(UserError, match=r"augment.hue, augment.saturation would change colours"):
        check_channels(PRESETS["dermoscopy"].strengths, 1)


def test_draws_depend_on_what_is_on_alone():
    usual = default.get_config().augment.to_dict()
    same = drawing_settings({**usual, "preset": "xray", "mixup": 0.2, "randaugment_strength": 0.5})
    assert drawing_settings(usual) == same
    one, other = ({**usual, "randaugment": 1, "randaugment_strength": m} for m in (0.5, 1.0))
    assert drawing_settings(one) != drawing_settings(other) != drawing_settings(usual)


@hypothesis.settings(max_examples=8)
@hypothesis.given(
    st.integers(5, 17), st.integers(5, 17), st.sampled_from([1, 3]), st.sampled_from(["u1", "i4"])
)
def test_any_size_and_channels(height, width, channels, dtype):
    policy = {name: value for name, value in ALL.items() if name != "quarter_turns"}
    shape = functools.partial(jax.eval_shape, make_augment(policy), jax.random.key(0))
    masks = jax.ShapeDtypeStruct((2, height, width), np.dtype(dtype))
    image = jax.ShapeDtypeStruct((2, height, width, channels), np.uint8)
    found, moved = shape(image, masks)
    assert (found.shape, found.dtype) == (image.shape, jnp.float32)
    assert (moved.shape, moved.dtype) == (masks.shape, masks.dtype)
