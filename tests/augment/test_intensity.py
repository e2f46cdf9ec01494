"""Intensity transforms against Pillow, colorsys, SciPy and scikit-image, and what all promise."""

import colorsys
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from skimage import color

from medtl_jax.augment import equalization, intensity

# A strength of each that changes every image it is drawn for.
STRENGTHS = {
    "brightness": 0.2,
    "contrast": 0.3,
    "gamma": 0.5,
    "hue": 0.3,
    "saturation": 0.5,
    "stain": 0.2,
    "noise": 0.1,
    "blur": 0.1,
    "bias_field": 0.5,
    "clahe": 1.0,
    "equalize": 1.0,
    "cutout": 0.4,
}
NAMES = sorted(STRENGTHS)
KEYS = jax.random.split(jax.random.key(0), 64)


# One compiled program instead of one an operation.
equalize = jax.jit(equalization.equalize)
clahe = jax.jit(equalization.clahe)


@functools.cache
def drawn_by(name):
    function = getattr(intensity, name)
    return jax.jit(jax.vmap(function, (0, 0, None)))


def drawn(name, image, strength=None, keys=KEYS):
    """The results over all keys, `[64, h, w, c]`; the strength is a tracer."""
    batch = np.broadcast_to(np.asarray(image, np.float32), (len(keys), *image.shape))
    return np.asarray(
        drawn_by(name)(keys, batch, STRENGTHS[name] if strength is None else strength)
    )


def scene(channels=3, height=12, width=10):
    """Random values, float32 with all levels between 20 and 235."""
    rng = np.random.default_rng(3)
    return rng.uniform(20, 235, (height, width, channels)).astype(np.float32)


def scale_of(found, image):
    """The factor and the offset of each result that is linear in the image, by least squares."""
    x = image.ravel().astype(float) - image.mean()
    y = found.reshape(len(found), -1).astype(float)
    return y @ x / (x @ x), y.mean(1) - image.mean()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_strength_zero_is_the_identity(name, channels):
    image = scene(channels)
    image[0, :3] = [[0.0], [255.0], [1e-3]]
    found = drawn(name, image, 0.0)
    np.testing.assert_allclose(found, np.broadcast_to(image, found.shape), atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_alone_is_the_one_among_64(name):
    # And a strength given as a constant is the one given as a tracer.
    alone = jax.jit(functools.partial(getattr(intensity, name), strength=STRENGTHS[name]))
    np.testing.assert_allclose(alone(KEYS[5], scene()), drawn(name, scene())[5], atol=1e-3)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"equalize"}))
def test_keys_draw_different_images(name):
    found = drawn(name, scene())
    different = {image.tobytes() for image in found}
    assert len(different) > 40
    np.testing.assert_array_equal(found, drawn(name, scene()))


@pytest.mark.parametrize("name", NAMES)
def test_results_are_clipped_to_the_range(name):
    image = scene()
    image[:6] = np.random.default_rng(0).choice([0.0, 255.0], (6, 10, 3))
    found = drawn(name, image, {"hue": 0.5}.get(name, 1.0))
    assert found.dtype == np.float32 and np.isfinite(found).all()
    assert found.min() == 0.0 and found.max() <= 255.0


SHAPES = st.sampled_from([(1, 1, 1), (1, 6, 3), (9, 5, 1)])


@pytest.mark.parametrize("name", NAMES)
@hypothesis.given(shape=SHAPES, seed=st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=10)
def test_any_shape_keeps_its_shape_and_range(name, shape, seed):
    height, width, channels = shape
    image = scene(channels, height, width)
    found = drawn(name, image, 0.5, jax.random.split(jax.random.key(seed), 1))[0]
    assert found.shape == image.shape and np.isfinite(found).all()
    assert found.min() >= 0.0 and found.max() <= 255.0


@pytest.mark.parametrize("name", sorted(intensity.COLOUR))
def test_colour_transforms_leave_grey_images_alone(name):
    image = scene(1)
    found = drawn(name, image)
    np.testing.assert_array_equal(found, np.broadcast_to(image, found.shape))
    assert np.abs(drawn(name, scene(3)) - scene(3)).max() > 5


def test_colour_names_those_that_need_three_channels():
    assert frozenset({"hue", "saturation", "stain"}) == intensity.COLOUR


def test_brightness_adds_one_draw_to_every_pixel():
    image = scene() / 2 + 64
    factor, offset = scale_of(drawn("brightness", image), image)
    np.testing.assert_allclose(factor, 1.0, atol=1e-4)
    assert -51.0 <= offset.min() < -38 and 38 < offset.max() <= 51.0


def test_contrast_is_pillows():
    image = np.rint(scene(1) / 3 + 80).astype(np.uint8)
    found = drawn("contrast", image)
    factors, offset = scale_of(found, image)
    np.testing.assert_allclose(offset, 0.0, atol=1e-3)
    assert 0.7 <= factors.min() < 0.75 and 1.25 < factors.max() <= 1.3
    for factor, one in zip(factors[:8], found, strict=False):
        expected = ImageEnhance.Contrast(Image.fromarray(image[..., 0])).enhance(factor)
        # Pillow rounds the mean and cuts off the fraction of a value.
        np.testing.assert_allclose(one[..., 0], np.asarray(expected, float), atol=1.5)


def test_gamma_is_one_exponent():
    image = scene(1)
    exponents = np.log(drawn("gamma", image) / 255) / np.log(image / 255)
    np.testing.assert_allclose(exponents, exponents[:, :1, :1] + 0 * exponents, rtol=1e-3)
    exponents = np.log(exponents[:, 0, 0, 0]) / np.log(1.5)
    assert -1.0 <= exponents.min() < -0.85 and 0.85 < exponents.max() <= 1.001
    assert abs(exponents.mean()) < 0.2


@pytest.mark.parametrize("turn", [0.0, 0.1, -0.3, 0.5, 1.0])
def test_turn_hue_is_colorsys(turn):
    image = scene(height=6, width=5)
    image[0, :3] = [[9, 9, 9], [200, 200, 10], [0, 0, 0]]
    expected = np.zeros_like(image)
    for i, j in np.ndindex(6, 5):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[i, j].astype(float) / 255))
        expected[i, j] = 255 * np.array(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
    np.testing.assert_allclose(intensity.turn_hue(image, turn), expected, atol=1e-2)


def test_hue_turns_all_pixels_by_one_draw():
    image = scene(height=4, width=3)
    hues = color.rgb2hsv(drawn("hue", image, 0.2) / 255)[..., 0]
    turned = (hues - color.rgb2hsv(image / 255)[..., 0] + 0.5) % 1 - 0.5
    np.testing.assert_allclose(turned, turned[:, :1, :1] + 0 * turned, atol=1e-3)
    assert -0.2 <= turned.min() < -0.15 and 0.15 < turned.max() <= 0.2


def test_saturation_is_pillows():
    image = np.rint(scene() / 3 + 80).astype(np.uint8)
    found = drawn("saturation", image)
    grey = np.asarray(equalization.luminance(jnp.asarray(image, jnp.float32)))[..., None]
    factors, _ = scale_of(found - grey, image - grey)
    assert 0.5 <= factors.min() < 0.6 and 1.4 < factors.max() <= 1.5
    for factor, one in zip(factors[:8], found, strict=False):
        expected = ImageEnhance.Color(Image.fromarray(image)).enhance(factor)
        np.testing.assert_allclose(one, np.asarray(expected, float), atol=1.5)


def test_stain_moves_scikit_images_stains_linearly():
    """Each stain's amount after is a factor times the amount before plus an offset."""
    # Made of positive amounts, as scikit-image cuts negative ones off; it divides by log(1e-6).
    amounts = np.random.default_rng(0).uniform(0.2, 0.6, (30, 1, 3))
    unit = -np.log(1e-6)
    image = 256 * color.hed2rgb(amounts / unit) - 1
    found = drawn("stain", image, 0.2)
    after = unit * color.rgb2hed((found.astype(np.float64) + 1) / 256)
    after = after.reshape(64, 30, 3)
    for stain in range(3):
        before = np.stack([amounts[:, 0, stain], np.ones(30)], 1)
        (factors, offsets), residuals, *_ = np.linalg.lstsq(before, after[..., stain].T)
        kept = (found > 0).all((1, 2, 3)) & (found < 255).all((1, 2, 3))
        kept &= (after > 0.01).all((1, 2))
        assert kept.sum() > 20 and residuals[kept].max() < 1e-6
        assert 0.8 <= factors[kept].min() < 0.85 and 1.15 < factors[kept].max() <= 1.2
        assert offsets[kept].min() >= -0.2 and 0.12 < offsets[kept].max() <= 0.2


def test_noise_is_gaussian_with_a_deviation_up_to_the_strength():
    image = np.full((64, 64, 1), 128.0, np.float32)
    noise = drawn("noise", image, 0.1) - image
    deviations = noise.std((1, 2, 3))
    assert deviations.min() < 2 and 23 < deviations.max() <= 26
    np.testing.assert_allclose(deviations.mean(), 12.75, rtol=0.2)
    standard = noise / deviations[:, None, None, None]
    inside = [(np.abs(standard) < limit).mean() for limit in (1, 2, 3)]
    np.testing.assert_allclose(inside, [0.6827, 0.9545, 0.9973], atol=0.005)
    shifted = (standard[:, 1:] * standard[:, :-1]).mean()
    assert abs(standard.mean()) < 0.01 and abs(shifted) < 0.01


@pytest.mark.parametrize("sigma", [0.0, 0.4, 1.3, 5.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_gaussian_blur_is_scipys(sigma, channels):
    image = scene(channels, 31, 24)
    found = jax.jit(intensity.gaussian_blur)(image, sigma)
    if sigma == 0:
        np.testing.assert_array_equal(found, image)
        return

    def filtered(x):
        return scipy.ndimage.gaussian_filter(x, sigma, axes=(0, 1), mode="constant", truncate=9)

    # What lies outside has no weight, and the rest has it all.
    expected = filtered(image.astype(float)) / filtered(np.ones(image.shape))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_blur_draws_sigma_up_to_a_fraction_of_the_shorter_side():
    image = np.zeros((41, 61, 1), np.float32)
    image[20] = 255.0
    peak = drawn("blur", image, 0.1)[:, 20, 30, 0] / 255
    rows = np.arange(-20, 21)
    sigmas = np.linspace(0.05, 4.1, 400)
    peaks = 1 / np.exp(-0.5 * (rows / sigmas[:, None]) ** 2).sum(1)
    assert peaks[-1] - 1e-4 <= peak.min() < peaks[360] and peak.max() > 0.95


def test_cosine_series_is_scipys_inverse_transform():
    coefficients = np.random.default_rng(0).uniform(-1, 1, (3, 4)).astype(np.float32)
    spectrum = np.zeros((9, 14))
    spectrum[:3, :4] = coefficients
    spectrum[1:] /= 2
    spectrum[:, 1:] /= 2
    found = intensity.cosine_series(jnp.asarray(coefficients), 9, 14)
    np.testing.assert_allclose(found, scipy.fft.dctn(spectrum, type=3), atol=1e-5)


def test_bias_field_is_smooth_and_the_same_in_all_channels():
    image = np.full((32, 24, 3), 100.0, np.float32) * np.array([0.5, 1.0, 1.2], np.float32)
    logarithm = np.log(drawn("bias_field", image, 0.5) / image)
    np.testing.assert_allclose(logarithm, logarithm[..., :1] + 0 * logarithm, atol=1e-4)
    largest = np.abs(logarithm).max((1, 2, 3)) / np.log(1.5)
    assert largest.min() < 0.1 and 0.9 < largest.max() <= 1.0001
    np.testing.assert_allclose(logarithm.mean((1, 2, 3)), 0.0, atol=1e-4)
    spectrum = np.abs(scipy.fft.dctn(logarithm[..., 0], axes=(1, 2)))
    spectrum[:, : intensity.FIELD_ORDER, : intensity.FIELD_ORDER] = 0
    assert spectrum.max() < 0.01


def test_clahe_goes_a_part_of_the_way():
    image = scene(1)
    full = np.asarray(clahe(image)) - image
    parts = (drawn("clahe", image, 0.6) - image).reshape(64, -1) @ full.ravel() / (full**2).sum()
    assert 0 <= parts.min() < 0.06 and 0.54 < parts.max() <= 0.6
    found = drawn("clahe", image, 0.6)
    expected = image + parts[:, None, None, None] * full
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_equalize_happens_with_its_probability():
    image = scene(1) / 2
    found = drawn("equalize", image, 0.3)
    equalized = np.asarray(equalize(image))
    done = np.abs(found - equalized).max((1, 2, 3)) < 1e-3
    kept = (found == image).all((1, 2, 3))
    assert (done ^ kept).all() and 10 <= done.sum() <= 29


@pytest.mark.parametrize(("fraction", "rows", "columns"), [(0.4, 4, 5), (0.5, 5, 6), (0.01, 0, 0)])
def test_cutout_fills_one_hole_with_the_mean_colour(fraction, rows, columns):
    image = scene(3, 10, 12)
    changed = (drawn("cutout", image, fraction) != image).any(-1)
    heights, widths = changed.any(2).sum(1), changed.any(1).sum(1)
    np.testing.assert_array_equal(changed.sum((1, 2)), heights * widths)
    assert heights.max() == rows and widths.max() == columns
    # A centre may be any pixel, so that half of the hole may be outside.
    assert heights.min() >= rows // 2 and widths.min() >= columns // 2
    filled = drawn("cutout", image, fraction)[changed]
    np.testing.assert_allclose(filled, image.mean((0, 1)) + 0 * filled, rtol=1e-5)


def test_cutout_covers_every_pixel_about_as_often():
    image = scene(1, 6, 6)
    keys = jax.random.split(jax.random.key(2), 2000)
    often = (drawn("cutout", image, 0.5, keys) != image).mean((0, 3))
    # Three of six rows: an inner pixel is hit by three centres, a pixel at the edge by two.
    np.testing.assert_allclose(often[2:4, 2:4], 0.25, atol=0.04)
    assert often.min() > 0.08
