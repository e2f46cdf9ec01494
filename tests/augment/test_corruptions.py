"""Corruptions: references in Pillow and NumPy, and draws that depend on an image's id alone."""

import io
import itertools

import hypothesis
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

from medtl_jax.augment import corruptions
from medtl_jax.augment.corruptions import NAMES, SEVERITIES, corrupt
from medtl_jax.augment.intensity import FIELD_ORDER, cosine_series
from medtl_jax.errors import UserError

IDS = ["a.png", "b.png", "c.png", "d.png"]


def images(n=4, side=48, channels=3):
    """Smooth scenes with a brighter square, uint8 `[n, side, side, channels]`, away from 0."""
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(3 * x + i) * np.cos(2 * y + c) for i in range(n) for c in range(channels)]
    waves = np.stack(waves).reshape(n, channels, side, side)
    found = np.rint(128 + 60 * np.moveaxis(waves, 1, -1)).astype(np.uint8)
    found[:, side // 4 : side // 2, side // 4 : side // 2] += 50
    return found


def distance(name, severity, channels=1, side=112):
    clean = images(channels=channels, side=side)
    return np.abs(corrupt(name, severity, clean, 0, IDS).astype(float) - clean).mean()


def test_the_names_and_severities_of_a_report():
    assert NAMES == ("noise", "blur", "contrast", "jpeg", "bias_field")
    assert SEVERITIES == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [28, 64, 112])
def test_every_severity_damages_more(name, channels, side):
    found = [0.05, *(distance(name, severity, channels, side) for severity in SEVERITIES)]
    assert all(more > 1.04 * less for less, more in itertools.pairwise(found)), found


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_the_same_among_others_and_in_another_order(name):
    together = corrupt(name, 3, images(), 7, IDS)
    assert together.dtype == np.uint8 and together.shape == images().shape
    for i in range(4):
        alone = corrupt(name, 3, images()[i : i + 1], 7, IDS[i : i + 1])
        np.testing.assert_array_equal(alone[0], together[i])
    backwards = corrupt(name, 3, images()[::-1], 7, IDS[::-1])
    np.testing.assert_array_equal(backwards[::-1], together)


@pytest.mark.parametrize("name", ["noise", "bias_field"])
def test_draws_depend_on_seed_and_id(name):
    same = np.repeat(images(1), 4, 0)
    found = [corrupt(name, 3, same, seed, IDS) for seed in (0, 1)]
    assert len({image.tobytes() for batch in found for image in batch}) == 8
    # A number counts as its decimal digits, whatever its type.
    numbers = corrupt(name, 3, same, 0, np.arange(4))
    np.testing.assert_array_equal(numbers, corrupt(name, 3, same, 0, ["0", "1", "2", "3"]))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_its_deviation(severity):
    grey = np.full((1, 96, 96, 1), 128, np.uint8)
    found = corrupt("noise", severity, grey, 0, [0]).astype(float) - 128
    deviation = 255 * corruptions.NOISE_DEVIATION[severity - 1]
    expected = np.clip(np.random.default_rng(1).normal(0, deviation, 10**5), -128, 127).std()
    np.testing.assert_allclose(found.std(), expected, rtol=0.03)
    assert abs(found.mean()) < 0.05 * deviation


@pytest.mark.parametrize("severity", [1, 5])
def test_blur_is_pillows_and_grows_with_the_side(severity):
    for side in (112, 224):
        point = np.zeros((1, side, side, 1), np.uint8)
        point[0, side // 2, side // 2 - 9 : side // 2 + 9] = 255
        found = corrupt("blur", severity, point, 0, [0])[0, ..., 0].astype(float)
        sigma = {1: 1.0, 5: 6.0}[severity] * side / 224
        rows = np.arange(side) - side // 2
        profile = np.exp(-0.5 * (rows / sigma) ** 2)
        profile /= profile.sum()
        # Pillow's blur is a sum of boxes, near to the Gaussian.
        pillow = Image.fromarray(point[0, ..., 0]).filter(ImageFilter.GaussianBlur(sigma))
        assert np.abs(found - np.asarray(pillow)).max() <= 0.06 * 255
        column = found[:, side // 2]
        expected = profile / profile.max() * column.max()
        np.testing.assert_allclose(column, expected, atol=2.0)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(
    ("side", "sigma"), [(28, (0.5, 0.6, 0.75, 0.9, 1.1)), (224, (1, 2, 3, 4, 6))]
)
def test_blur_is_at_least_as_wide_as_pixels_show(severity, side, sigma):
    image = images(1, side)
    wanted = scipy.ndimage.gaussian_filter(image[0].astype(float), sigma[severity - 1], axes=(0, 1))
    found = corrupt("blur", severity, image, 0, [0])[0]
    np.testing.assert_allclose(found, wanted, atol=0.51)
    assert (found != image[0]).any()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_is_pillows(severity):
    image = images(1, channels=1)
    enhance = ImageEnhance.Contrast(Image.fromarray(image[0, ..., 0]))
    expected = np.asarray(enhance.enhance(corruptions.CONTRAST_FACTOR[severity - 1]))
    found = corrupt("contrast", severity, image, 0, [0])[0, ..., 0]
    # Pillow rounds the mean and cuts off the fraction of a value.
    np.testing.assert_allclose(found, expected.astype(float), atol=1.01)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_a_file_of_that_quality(channels):
    image = images(1, channels=channels)[0]
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "JPEG", quality=15)
    expected = np.asarray(Image.open(file)).reshape(image.shape)
    np.testing.assert_array_equal(corrupt("jpeg", 3, image[None], 0, [0])[0], expected)


def test_the_bias_field_is_a_cosine_series_of_its_ratio():
    flat = np.full((1, 60, 41, 1), 80, np.uint8)
    field = np.log(corrupt("bias_field", 5, flat, 0, ["x"])[0, ..., 0] / 80.0)
    np.testing.assert_allclose(np.abs(field).max(), np.log(3.0), atol=0.01)
    assert abs(field.mean()) < 0.01
    basis = [np.eye(1, FIELD_ORDER**2, k).reshape(FIELD_ORDER, FIELD_ORDER) for k in range(1, 16)]
    basis = [np.asarray(cosine_series(b.astype(np.float32), 60, 41)).ravel() for b in basis]
    basis = np.stack(basis, 1)
    fitted = basis @ np.linalg.lstsq(basis, field.ravel(), rcond=None)[0]
    # What is left is the rounding to whole grey levels.
    assert np.abs(fitted - field.ravel()).max() < 0.025


@hypothesis.given(
    st.sampled_from(NAMES),
    st.sampled_from(SEVERITIES),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([1, 3]),
    st.integers(0, 2**70),
)
def test_any_shape_and_seed(name, severity, height, width, channels, seed):
    clean = np.random.default_rng(0).integers(0, 256, (2, height, width, channels), np.uint8)
    found = corrupt(name, severity, clean, seed, ["a", "b"])
    assert found.shape == clean.shape and found.dtype == np.uint8
    np.testing.assert_array_equal(found, corrupt(name, severity, clean, seed, ["a", "b"]))


def test_the_images_given_stay_as_they_are():
    clean = images()
    before = clean.copy()
    for name in NAMES:
        corrupt(name, 5, clean, 0, IDS)
    np.testing.assert_array_equal(clean, before)


def test_no_images_give_none():
    assert corrupt("jpeg", 1, images()[:0], 0, []).shape == (0, 48, 48, 3)


@pytest.mark.parametrize(
    ("name", "severity", "seed", "message"),
    [
        ("fog", 1, 0, "'fog' is unknown; choose from noise, blur, contrast, jpeg, bias_field"),
        ("blur", 0, 0, "severity 0 must be one of 1, 2, 3, 4, 5"),
        ("blur", 6, 0, "severity 6 must be"),
        ("blur", 1, -1, "seed -1 must not be negative"),
    ],
)
def test_a_users_mistake_is_one_line(name, severity, seed, message):
    with pytest.raises(UserError, match=message):
        corrupt(name, severity, images(), seed, IDS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (images().astype(np.float32), "float32 .* images are not uint8"),
        (images()[0], "images are not uint8"),
        (images()[..., :2], "images are not uint8"),
        (images()[:3], "4 ids for 3 images"),
    ],
    ids=["float", "one image", "two channels", "ids"],
)
def test_arrays_of_another_kind_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        corrupt("blur", 1, wrong, 0, IDS)
