"""Equalisation and CLAHE against Pillow, scikit-image, OpenCV's numbers and a loop over pixels."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageOps
from skimage import exposure

from medtl_jax.augment import equalization

# One compiled program each instead of one an operation.
equalize = jax.jit(equalization.equalize)
clahe = jax.jit(equalization.clahe, static_argnames=("clip_limit", "tiles"))

# Two waves and a ramp, so that tiles differ and counts are lumpy.
WAVES = (40 + 5 * np.arange(16)[:, None] + np.arange(16)[None] ** 2 % 23).astype(np.uint8)
# Two levels in each of four tiles of 32 x 32.
QUARTERS = np.kron(np.array([[20, 90], [140, 230]], np.uint8), np.ones((32, 32), np.uint8))
QUARTERS[::2] += 10


def photograph(side, channels, seed=0):
    """A smooth random scene with some noise, uint8 `[side, side, channels]`."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(20, 200, (5, 5, channels)).astype(np.uint8)
    scene = [np.asarray(Image.fromarray(c).resize((side, side))) for c in np.moveaxis(coarse, 2, 0)]
    return (np.stack(scene, -1) + rng.integers(0, 30, (side, side, channels))).astype(np.uint8)


def test_equalize_by_hand():
    # Below 10: 0 pixels, below 20: 2, below 30: 3, which is scaled to 255.
    image = np.array([[10, 10], [20, 30]], np.uint8)[..., None]
    np.testing.assert_array_equal(equalize(image)[..., 0], [[0, 0], [170, 255]])


def test_equalize_is_pillows_where_its_integer_step_is_exact():
    # Pillow divides in integers; with 4 of 1024 pixels at the top level its step is 1020 / 255.
    image = np.random.default_rng(0).integers(0, 90, (32, 32)).astype(np.uint8)
    image = np.minimum(image**2 // 40, 200)
    image.flat[[3, 99, 500, 1023]] = 220
    expected = np.asarray(ImageOps.equalize(Image.fromarray(image)))
    np.testing.assert_array_equal(equalize(image[..., None])[..., 0], expected)


def test_equalize_is_pillows_within_a_level_on_a_photograph():
    image = photograph(128, 1)
    expected = np.asarray(ImageOps.equalize(Image.fromarray(image[..., 0]))).astype(np.float32)
    found = np.asarray(equalize(image))[..., 0]
    assert np.abs(found - expected).max() <= 2
    assert np.abs(found - image[..., 0]).mean() > 10


def test_equalized_levels_are_equally_frequent():
    values = np.sort(np.asarray(equalize(photograph(128, 1))).ravel())
    uniform = np.linspace(0, 255, values.size)
    assert np.abs(values - uniform).max() < 8
    before = np.sort(photograph(128, 1).ravel())
    assert np.abs(before - uniform).max() > 20


@pytest.mark.parametrize("enhance", [equalize, clahe])
def test_colours_keep_their_chroma(enhance):
    # Inside the range, so that nothing is clipped.
    image = photograph(64, 3) // 3 + 90
    found = np.asarray(enhance(image))
    inside = (found > 0).all(-1) & (found < 255).all(-1)
    assert inside.mean() > 0.5
    for channel in (1, 2):
        difference = found[..., channel] - found[..., 0]
        expected = image[..., channel].astype(float) - image[..., 0]
        np.testing.assert_allclose(difference[inside], expected[inside], atol=1e-3)


@pytest.mark.parametrize("enhance", [equalize, clahe])
def test_grey_in_three_channels_is_grey(enhance):
    grey = photograph(40, 1)
    found = np.asarray(enhance(np.repeat(grey, 3, axis=-1)))
    np.testing.assert_allclose(found, np.repeat(enhance(grey), 3, axis=-1), atol=1e-3)


def test_luminance_is_pillows():
    image = photograph(32, 3)
    expected = np.asarray(Image.fromarray(image).convert("L")).astype(np.float32)
    found = np.asarray(equalization.luminance(image.astype(np.float32)))
    np.testing.assert_allclose(found, expected, atol=0.51)


def test_clahe_is_opencvs():
    """Numbers of cv2.createCLAHE(limit, (n, n)), which rounds each table and each result.

    The limits leave OpenCV no remainder to spread: it would go to every k-th level from 0 on.
    """
    expected = [
        [13, 26, 38, 80, 134, 16, 89, 20, 121, 44, 13],
        [128, 134, 146, 166, 194, 115, 172, 117, 188, 145, 128],
        [197, 209, 243, 244, 255, 149, 243, 152, 255, 224, 197],
    ]
    found = clahe(WAVES[:13, :11, None], clip_limit=1000.0, tiles=3)[..., 0]
    np.testing.assert_allclose(np.asarray(found)[[0, 5, 12]], expected, atol=1.0)
    expected = [
        [143, 127, 178, 178],
        [74, 66, 125, 109],
        [111, 99, 146, 146],
        [164, 160, 218, 209],
        [134, 126, 195, 179],
    ]
    found = np.asarray(clahe(QUARTERS[..., None], clip_limit=64.0, tiles=2))[..., 0]
    found = found[np.ix_([0, 1, 24, 33, 63], [0, 20, 40, 63])]
    np.testing.assert_allclose(found, expected, atol=1.0)


def test_clahe_without_a_limit_is_scikit_images():
    image = photograph(128, 1)
    expected = 255 * exposure.equalize_adapthist(image[..., 0], (16, 16), clip_limit=1.0)
    found = np.asarray(clahe(image, clip_limit=256.0, tiles=8))[..., 0]
    # scikit-image counts 2**14 levels in bins of 65 and stretches the result to the full range.
    assert np.abs(found - expected).mean() < 2
    assert np.abs(found - image[..., 0]).mean() > 20


def looped_clahe(image, clip_limit, tiles):
    """CLAHE of a grey image `[h, w]`, one pixel and one tile at a time."""
    height, width = image.shape
    rows, columns = -(-height // tiles), -(-width // tiles)
    padding = ((0, rows * tiles - height), (0, columns * tiles - width))
    padded = np.pad(image, padding, mode="reflect")
    tables = np.zeros((tiles, tiles, 256))
    for i, j in np.ndindex(tiles, tiles):
        tile = padded[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        counts = np.bincount(tile.ravel(), minlength=256).astype(float)
        limit = max(clip_limit * tile.size / 256, 1)
        excess = np.clip(counts - limit, 0, None).sum()
        tables[i, j] = 255 * np.cumsum(np.minimum(counts, limit) + excess / 256) / tile.size
    found = np.zeros(image.shape)
    for y, x in np.ndindex(*image.shape):
        for i, j in np.ndindex(tiles, tiles):
            # Beyond the outer centres the outer tile alone counts.
            down = np.clip(y / rows - 0.5, 0, tiles - 1) - i
            across = np.clip(x / columns - 0.5, 0, tiles - 1) - j
            weight = max(0, 1 - abs(down)) * max(0, 1 - abs(across))
            found[y, x] += weight * tables[i, j, image[y, x]]
    return found


@pytest.mark.parametrize(
    ("side", "clip_limit", "tiles"),
    [((24, 24), 2.0, 3), ((23, 17), 4.0, 4), ((3, 14), 1.5, 8)],
)
def test_clahe_is_the_loop(side, clip_limit, tiles):
    image = photograph(32, 1)[: side[0], : side[1]]
    found = np.asarray(clahe(image, clip_limit=clip_limit, tiles=tiles))[..., 0]
    np.testing.assert_allclose(found, looped_clahe(image[..., 0], clip_limit, tiles), atol=0.01)


def test_a_lower_limit_changes_less():
    image = photograph(128, 1)
    spread = [float(clahe(image, clip_limit=limit, tiles=4).std()) for limit in (1.0, 4.0, 40.0)]
    assert spread == sorted(spread) and spread[-1] > 1.1 * spread[0]


@pytest.mark.parametrize(("clip_limit", "tiles"), [(0.0, 8), (-1.0, 8), (2.0, 0)])
def test_impossible_settings_are_refused(clip_limit, tiles):
    with pytest.raises(ValueError, match=f"tiles={tiles} .* clip_limit={clip_limit}"):
        equalization.clahe(WAVES[..., None], clip_limit, tiles)


@pytest.mark.parametrize("enhance", [equalize, clahe])
def test_two_channels_are_refused(enhance):
    with pytest.raises(ValueError, match="2 channels is neither grey"):
        enhance(np.zeros((8, 8, 2), np.uint8))


@pytest.mark.parametrize("enhance", [equalize, clahe])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_under_jit_is_the_images_one_by_one(enhance, channels):
    images = np.stack([photograph(20, channels, seed) for seed in range(5)])
    together = jax.jit(jax.vmap(enhance))(images)
    for image, found in zip(images, together, strict=True):
        np.testing.assert_allclose(found, enhance(image), atol=1e-3)


SHAPES = st.sampled_from([(1, 1, 1), (1, 7, 3), (9, 5, 1)])
KINDS = {np.uint8: st.integers(0, 255), np.float32: st.floats(0, 255, width=32)}


@hypothesis.given(st.data(), SHAPES, st.sampled_from(list(KINDS)))
@hypothesis.settings(max_examples=30)
def test_any_image_keeps_its_shape_and_range(data, shape, dtype):
    image = data.draw(hnp.arrays(dtype, shape, elements=KINDS[dtype]))
    for enhance in (equalize, clahe):
        found = np.asarray(enhance(image))
        assert found.shape == shape and found.dtype == np.float32
        assert found.min() >= 0 and found.max() <= 255


@hypothesis.given(st.integers(0, 255))
@hypothesis.settings(max_examples=10)
def test_a_constant_image_has_nothing_to_equalize(level):
    image = np.full((6, 5, 1), level, np.uint8)
    np.testing.assert_array_equal(equalize(image), image)
