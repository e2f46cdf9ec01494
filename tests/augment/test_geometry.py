"""Geometric augmentation against SciPy, and one draw that moves image, mask and boxes alike."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.interpolate
import scipy.ndimage
from hypothesis import strategies as st

from medtl_jax.augment import geometry
from medtl_jax.augment.geometry import LIMITS, Geometry, Placement
from medtl_jax.errors import UserError

SQUARE, WIDE = (24, 24), (21, 34)
FULL = Geometry(
    flip_horizontal=0.5,
    flip_vertical=0.5,
    shift=0.1,
    rotate=20.0,
    scale=0.2,
    shear=10.0,
    crop=0.3,
    elastic=0.03,
)
WHOLE_PIXELS = Geometry(flip_horizontal=0.5, flip_vertical=0.5, quarter_turns=0.7, shift=0.2)


# One source, moved by each of many placements.
move_one = jax.jit(jax.vmap(geometry.move_image, (0, None)))


def keys(n):
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(3)))(jnp.arange(n))


@functools.cache
def draws(n, size, settings):
    """`n` placements, stacked."""
    return jax.jit(jax.vmap(lambda key: geometry.draw(key, size, settings)))(keys(n))


def rigid(matrix, whole_pixels=False):
    """A placement by hand from the first two lines of its matrix."""
    matrix = jnp.array([*matrix, (0.0, 0.0, 1.0)], jnp.float32)
    return Placement(matrix=matrix, controls=None, whole_pixels=whole_pixels)


def picture(size, channels=1, seed=0):
    """Smooth enough that a thousandth of a pixel hardly shows."""
    noise = np.random.default_rng(seed).uniform(0, 255, (*size, channels))
    return scipy.ndimage.gaussian_filter(noise, (2, 2, 0)).astype(np.float32)


def coordinates(size):
    """The coordinate grid as an image `[h, w, 2]` of (row, column)."""
    return np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1).astype(np.float32)


# The result for [[1, 2], [3, 4]], by hand: which line of the matrix reads which pixel.
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([(1, 0, 0), (0, -1, 0)], [[2, 1], [4, 3]]),
        ([(-1, 0, 0), (0, 1, 0)], [[3, 4], [1, 2]]),
        ([(0, 1, 0), (-1, 0, 0)], [[2, 4], [1, 3]]),
        ([(1, 0, 1), (0, 1, 0)], [[3, 4], [3, 4]]),
        ([(1, 0, 0), (0, 1, -1)], [[1, 1], [3, 3]]),
    ],
    ids=["left-right", "upside-down", "quarter turn", "up", "right"],
)
@pytest.mark.parametrize("whole_pixels", [True, False])
def test_whole_pixels_by_hand(lines, expected, whole_pixels):
    placement = rigid(lines, whole_pixels)
    source = jnp.array([[1, 2], [3, 4]])
    moved = geometry.move_image(placement, source[..., None].astype(jnp.float32))
    np.testing.assert_array_equal(moved[..., 0], expected)
    np.testing.assert_array_equal(geometry.move_mask(placement, source), expected)


@pytest.mark.parametrize(
    ("name", "axes"), [("flip_horizontal", 1), ("flip_vertical", 0), ("quarter_turns", (0, 1))]
)
@pytest.mark.parametrize(
    ("probability", "low", "high"), [(0.5, 70, 130), (0.1, 5, 40), (1.0, 200, 200)]
)
def test_flips_and_turns_happen_with_their_probability(name, axes, probability, low, high):
    image = np.arange(9, dtype=np.float32).reshape(3, 3, 1)
    turned = [np.rot90(image, k, axes) for k in (1, 2, 3)] if name == "quarter_turns" else []
    allowed = turned or [np.flip(image, axes)]
    placements = draws(200, (3, 3), Geometry(**{name: probability}))
    moved = np.asarray(move_one(placements, image))
    counts = [int((moved == other).all((1, 2, 3)).sum()) for other in allowed]
    assert low <= sum(counts) <= high and min(counts) > 0
    assert sum(counts) + (moved == image).all((1, 2, 3)).sum() == 200


def test_shifts_are_by_whole_pixels_and_repeat_the_edge():
    image = np.arange(16, dtype=np.float32).reshape(4, 4, 1)
    placements = draws(200, (4, 4), Geometry(shift=0.25))
    moved = np.asarray(move_one(placements, image))
    # One pixel at most in each direction: nine images.
    steps = [np.clip(np.arange(4) + step, 0, 3) for step in (-1, 0, 1)]
    expected = {image[np.ix_(rows, columns)].tobytes() for rows in steps for columns in steps}
    assert {found.tobytes() for found in moved} == expected


def matrices(n, size, **strengths):
    return np.asarray(draws(n, size, Geometry(**strengths)).matrix, np.float64)


def test_rotations_reach_their_limit_either_way():
    found = matrices(200, WIDE, rotate=20.0)
    angle = np.rad2deg(np.arctan2(found[:, 1, 0], found[:, 0, 0]))
    assert -20 <= angle.min() < -18 and 18 < angle.max() <= 20
    cosine, sine = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    expected = np.zeros((200, 3, 3))
    expected[:, 0, 0] = expected[:, 1, 1] = cosine
    expected[:, 0, 1], expected[:, 1, 0], expected[:, 2, 2] = -sine, sine, 1
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_shears_reach_their_limit_along_each_axis():
    found = matrices(200, WIDE, shear=10.0)
    for at in ((0, 1), (1, 0)):
        angle = np.rad2deg(np.arctan(found[:, *at]))
        assert -10 <= angle.min() < -9 and 9 < angle.max() <= 10
        found[:, *at] = 0
    np.testing.assert_array_equal(found, np.broadcast_to(np.eye(3), found.shape))


def test_scale_magnifies_by_its_factor():
    found = matrices(200, WIDE, scale=0.2)
    factor = 1 / found[:, 0, 0]
    assert 0.8 <= factor.min() < 0.82 and 1.18 < factor.max() <= 1.2
    found *= np.stack([factor, factor, np.ones(200)], -1)[:, None]
    np.testing.assert_allclose(found, np.broadcast_to(np.eye(3), found.shape), atol=1e-6)


def test_a_crop_keeps_the_aspect_and_stays_within_the_image():
    found = matrices(200, WIDE, crop=0.3)
    np.testing.assert_array_equal(found[:, 0, 0], found[:, 1, 1])
    area = found[:, 0, 0] ** 2
    assert 0.7 - 1e-6 <= area.min() < 0.72 and 0.98 < area.max() <= 1
    # Where the outer corners of the result lie in the source, in pixels from its outer corner.
    for axis, side in enumerate(WIDE):
        start = side / 2 - found[:, axis, axis] * side / 2 + found[:, axis, 2]
        end = start + found[:, axis, axis] * side
        assert start.min() >= -1e-4 and end.max() <= side + 1e-4
        rest = side - (end - start)
        assert (start < 0.1 * rest).any() and (start > 0.9 * rest).any()


@pytest.mark.parametrize("size", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize(
    "strengths",
    [
        {"rotate": 180.0},
        {"shear": 30.0},
        {"scale": 0.5},
        {"crop": 0.7},
        {"rotate": 30.0, "shear": 10.0, "scale": 0.3, "crop": 0.3, "shift": 0.2},
    ],
    ids=lambda strengths: "+".join(strengths),
)
def test_affine_maps_agree_with_scipy(size, strengths):
    image, placements = picture(size), draws(4, size, Geometry(**strengths))
    moved = move_one(placements, image)
    centre = (np.array(size) - 1) / 2
    for index, matrix in enumerate(np.asarray(placements.matrix, np.float64)):
        linear, offset = matrix[:2, :2], matrix[:2, 2]
        expected = scipy.ndimage.affine_transform(
            image[..., 0].astype(np.float64),
            linear,
            centre + offset - linear @ centre,
            order=1,
            mode="nearest",
        )
        np.testing.assert_allclose(moved[index, ..., 0], expected, atol=5e-3)
        assert np.abs(expected - image[..., 0]).max() > 1


def displaced(controls, size):
    """Source coordinates `[h, w, 2]` by SciPy's tensor-product cubic B-spline over four cells."""
    knots = np.arange(-3, 8, dtype=float)
    spline = scipy.interpolate.NdBSpline((knots, knots), np.moveaxis(controls, 0, -1), 3)
    grid = coordinates(size).astype(np.float64)
    return grid + spline((grid + 0.5) * 4 / size) * size


@pytest.mark.parametrize("size", [SQUARE, WIDE], ids=["square", "wide"])
def test_elastic_displacements_agree_with_scipy(size):
    image, placements = picture(size), draws(4, size, Geometry(elastic=0.05))
    moved = move_one(placements, image)
    for index, controls in enumerate(np.asarray(placements.controls, np.float64)):
        assert 0.045 < np.abs(controls).max() <= 0.05
        expected = scipy.ndimage.map_coordinates(
            image[..., 0].astype(np.float64),
            np.moveaxis(displaced(controls, size), -1, 0),
            order=1,
            mode="nearest",
        )
        np.testing.assert_allclose(moved[index, ..., 0], expected, atol=5e-3)


def strongest_displacements():
    """Controls at the limit: random signs, and each axis' signs turning from point to point."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (30, 2, 7, 7))
    row, column = np.indices((7, 7))
    for index, pattern in enumerate((row, column, row + column)):
        signs[index] = (-1.0) ** pattern
    signs[3, 1] *= -1
    return (LIMITS["elastic"] * signs).astype(np.float32)


def test_the_strongest_elastic_displacement_does_not_fold():
    for controls in strongest_displacements():
        source = displaced(controls.astype(np.float64), (60, 60))
        down, right = np.diff(source, axis=0)[:, :-1], np.diff(source, axis=1)[:-1]
        area = down[..., 0] * right[..., 1] - down[..., 1] * right[..., 0]
        assert area.min() > 0.05
        assert np.abs(source - coordinates((60, 60))).max() <= LIMITS["elastic"] * 60 + 1e-9


@pytest.mark.parametrize(("strength", "pixels"), [(1.0, 0.01), (0.5, 5e-4)])
def test_the_inverse_of_an_elastic_displacement_is_accurate(strength, pixels):
    """From the source coordinates that SciPy finds for the result's pixels, back to the pixels."""

    @jax.jit
    def forward(controls, points):
        placement = Placement(jnp.eye(3), controls, whole_pixels=False)
        return geometry._forward(placement, points, (128, 128))

    inner = coordinates((128, 128))[4::8, 4::8]
    for controls in strength * strongest_displacements()[:8]:
        source = displaced(controls.astype(np.float64), (128, 128))[4::8, 4::8]
        found = forward(jnp.asarray(controls, jnp.float32), jnp.asarray(source, jnp.float32))
        np.testing.assert_allclose(found, inner, atol=pixels)


def sources(size, settings, n):
    """Placements, and for each pixel of the results its source, read from a warped grid."""
    placements = draws(n, size, settings)
    grid = coordinates(size)
    return placements, np.asarray(move_one(placements, grid))


@pytest.mark.parametrize("size", [SQUARE, WIDE], ids=["square", "wide"])
def test_images_and_masks_move_as_a_warped_coordinate_grid_says(size):
    rng = np.random.default_rng(1)
    image = picture(size, channels=3)
    mask = rng.integers(0, 5, size).astype(np.uint8)
    placements, found = sources(size, FULL, 8)
    moved = np.asarray(move_one(placements, image))
    masks = np.asarray(jax.jit(jax.vmap(geometry.move_mask, (0, None)))(placements, mask))
    assert masks.dtype == np.uint8
    for index, source in enumerate(found):
        for channel in range(3):
            expected = scipy.ndimage.map_coordinates(
                image[..., channel], np.moveaxis(source, -1, 0), order=1, mode="nearest"
            )
            np.testing.assert_allclose(moved[index, ..., channel], expected, atol=1e-2)
        nearest = np.round(source).astype(int)
        tied = (np.abs(source - np.floor(source) - 0.5) < 1e-4).any(-1)
        assert tied.mean() < 0.02
        expected = mask[nearest[..., 0], nearest[..., 1]]
        np.testing.assert_array_equal(masks[index][~tied], expected[~tied])
        assert (masks[index] != mask).mean() > 0.3


def test_no_strength_leaves_everything_as_it_is():
    image, mask = picture(WIDE), np.arange(21 * 34).reshape(WIDE)
    boxes = jnp.array([[2.0, 1.0, 5.0, 4.0]])
    placement = geometry.draw(jax.random.key(0), WIDE, Geometry())
    assert jax.tree.leaves(placement) == []
    assert geometry.move_image(placement, image) is image
    assert geometry.move_mask(placement, mask) is mask
    assert geometry.move_boxes(placement, boxes, WIDE) is boxes


def test_traced_strengths_do_what_numbers_do_and_nothing_at_zero():
    image, mask = picture(WIDE), jnp.arange(21 * 34, dtype=jnp.int32).reshape(WIDE)
    boxes = jnp.array([[2.0, 1.0, 15.0, 14.0]])

    def moved(factor):
        strengths = {name: factor * getattr(FULL, name) for name in LIMITS if FULL.uses(name)}
        placement = geometry.draw(jax.random.key(5), WIDE, Geometry(**strengths))
        return (
            geometry.move_image(placement, image),
            geometry.move_mask(placement, mask),
            geometry.move_boxes(placement, boxes, WIDE),
        )

    traced = jax.jit(moved)
    for new, kept in zip(traced(jnp.float32(0)), (image, mask, boxes), strict=True):
        np.testing.assert_array_equal(new, kept)
    found, expected = traced(jnp.float32(1)), jax.jit(lambda: moved(1.0))()
    np.testing.assert_allclose(found[0], expected[0], atol=1e-2)
    assert (found[1] == expected[1]).mean() > 0.99
    np.testing.assert_allclose(found[2], expected[2], atol=1e-3)


def test_the_exact_and_the_interpolating_path_agree():
    image, placements = picture(SQUARE, 3), draws(16, SQUARE, WHOLE_PIXELS)
    assert placements.whole_pixels
    exact = move_one(placements, image)
    other = placements.replace(whole_pixels=False)
    interpolated = move_one(other, image)
    np.testing.assert_array_equal(exact, interpolated)
    assert len({found.tobytes() for found in np.asarray(exact)}) > 8
    still = placements.replace(controls=jnp.zeros((16, 2, 7, 7)), whole_pixels=False)
    bent = move_one(still, image)
    np.testing.assert_allclose(exact, bent, atol=1e-3)


@pytest.mark.parametrize("settings", [FULL, WHOLE_PIXELS], ids=["full", "whole pixels"])
def test_one_example_is_moved_as_in_a_batch(settings):
    rng = np.random.default_rng(2)
    images = rng.uniform(0, 255, (64, *SQUARE, 1)).astype(np.float32)

    @jax.jit
    def moved(keys, images):
        placements = jax.vmap(lambda key: geometry.draw(key, SQUARE, settings))(keys)
        return jax.vmap(geometry.move_image)(placements, images)

    batch = np.asarray(moved(keys(64), images))
    np.testing.assert_allclose(batch[:1], moved(keys(1), images[:1]), atol=1e-2)
    assert np.abs(batch - images).max((1, 2, 3)).min() > 1 or settings is WHOLE_PIXELS


def test_no_transform_changes_the_draw_of_another():
    """The draw of all is the product of single draws, in the documented order."""
    order = ["rotate", "shear", "scale", "crop"]
    order += ["quarter_turns", "shift", "flip_vertical", "flip_horizontal"]
    everything = {name: getattr(FULL, name) for name in LIMITS} | {"quarter_turns": 0.5}
    together = draws(8, SQUARE, Geometry(**everything))
    product = np.broadcast_to(np.eye(3), (8, 3, 3))
    for name in order:
        product = matrices(8, SQUARE, **{name: everything[name]}) @ product
    np.testing.assert_allclose(together.matrix, product, atol=1e-5)
    alone = draws(8, SQUARE, Geometry(elastic=FULL.elastic))
    np.testing.assert_array_equal(together.controls, alone.controls)


@hypothesis.settings(max_examples=6)
@hypothesis.given(
    size=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    channels=st.sampled_from([1, 3]),
    dtype=st.sampled_from([np.uint8, np.int32]),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_shape_and_dtype(size, channels, dtype, seed):
    rng = np.random.default_rng(seed)
    image = rng.uniform(0, 255, (*size, channels)).astype(np.float32)
    mask = rng.integers(0, 200, size).astype(dtype)

    placement = geometry.draw(jax.random.key(seed), size, FULL)
    found = jax.jit(geometry.move_image)(placement, image)
    labels = jax.jit(geometry.move_mask)(placement, mask)
    assert found.shape == image.shape and found.dtype == np.float32
    assert labels.shape == mask.shape and labels.dtype == dtype
    assert set(np.unique(labels)) <= set(np.unique(mask))
    assert image.min() - 1e-3 <= found.min() and found.max() <= image.max() + 1e-3


@hypothesis.given(st.sampled_from(sorted(LIMITS)), st.floats())
def test_a_strength_outside_its_limit_is_refused(name, strength):
    if 0 <= strength <= LIMITS[name]:
        assert getattr(Geometry(**{name: strength}), name) == strength
    else:
        with pytest.raises(UserError, match=rf"augment\.{name}=.* must lie in 0\.\."):
            Geometry(**{name: strength})


def test_quarter_turns_of_other_than_square_images_are_refused():
    with pytest.raises(UserError, match="quarter_turns needs square images, not 21 x 34"):
        geometry.draw(jax.random.key(0), WIDE, Geometry(quarter_turns=0.5))


def test_transforms_draw_independently():
    columns = {
        "rotate": matrices(200, WIDE, rotate=20.0)[:, 1, 0],
        "shear down": matrices(200, WIDE, shear=10.0)[:, 0, 1],
        "shear right": matrices(200, WIDE, shear=10.0)[:, 1, 0],
        "scale": matrices(200, WIDE, scale=0.2)[:, 0, 0],
        "crop": matrices(200, WIDE, crop=0.3)[:, 0, 0],
        "crop down": matrices(200, WIDE, crop=0.3)[:, 0, 2],
        "shift down": matrices(200, WIDE, shift=0.2)[:, 0, 2],
        "shift right": matrices(200, WIDE, shift=0.2)[:, 1, 2],
        "flip": matrices(200, WIDE, flip_horizontal=0.5)[:, 1, 1],
        "flip vertical": matrices(200, WIDE, flip_vertical=0.5)[:, 0, 0],
    }
    correlation = np.corrcoef(list(columns.values())) - np.eye(len(columns))
    assert np.abs(correlation).max() < 0.3  # more than four standard errors
