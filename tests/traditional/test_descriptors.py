"""Descriptors against scikit-image called directly, and what is kept of them on disk."""

import numpy as np
import pytest
from PIL import Image
from skimage.feature import hog, local_binary_pattern

from medtl_jax.data.catalog import Split
from medtl_jax.traditional.descriptors import DESCRIPTORS, described, kept_descriptors


def images(count=5, size=32, channels=1, seed=0):
    return (
        np.random.default_rng(seed).integers(0, 256, (count, size, size, channels)).astype(np.uint8)
    )


def described_all(name, given):
    return np.concatenate(list(described(name, given, lambda *args: None)))


@pytest.mark.parametrize("channels", [1, 3])
def test_hog_is_that_of_scikit_image(channels):
    given = images(channels=channels)
    wanted = [
        hog(image, 9, (4, 4), (2, 2), block_norm="L2-Hys", channel_axis=-1) for image in given
    ]
    found = described_all("hog", given)
    assert found.shape == (5, 1764) and found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack(wanted), rtol=1e-6, atol=1e-7)


def test_lbp_counts_the_patterns_of_scikit_image_in_sixteen_parts():
    (image,) = images(1)
    patterns = local_binary_pattern(image[..., 0], 8, 1, "nri_uniform").astype(int)
    (found,) = described_all("lbp", image[None])
    assert found.shape == (16 * 59,)
    for number in range(16):
        row, column = divmod(number, 4)
        part = patterns[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        counts = [(part == pattern).sum() / 64 for pattern in range(59)]
        np.testing.assert_allclose(found[59 * number : 59 * number + 59] ** 2, counts, atol=1e-7)


def test_lbp_of_colour_is_that_of_its_luma():
    colour = images(2, channels=3)
    grey = np.stack(
        [np.asarray(Image.fromarray(image).convert("L"))[..., None] for image in colour]
    )
    np.testing.assert_array_equal(described_all("lbp", colour), described_all("lbp", grey))


def test_raw_pixels_are_means_over_equal_parts():
    given = images(3, size=64, channels=3)
    wanted = given.reshape(3, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    found = described_all("pixels", given).reshape(3, 32, 32, 3)
    np.testing.assert_allclose(found * 255, wanted, rtol=1e-5)
    small = images(2, size=28)
    np.testing.assert_allclose(
        described_all("pixels", small) * 255, small.reshape(2, -1), rtol=1e-6
    )


@pytest.mark.parametrize("name", DESCRIPTORS)
@pytest.mark.parametrize("size", [28, 33, 64])
def test_blocks_change_nothing(name, size):
    given, seen = images(70, size), []
    blocks = list(described(name, given, lambda *done: seen.append(done)))
    assert [len(block) for block in blocks] == [64, 6] and seen == [(64, 70, ""), (70, 70, "")]
    alone = np.concatenate([described_all(name, given[i : i + 1]) for i in range(70)])
    np.testing.assert_array_equal(np.concatenate(blocks), alone)


def test_descriptors_are_kept_by_their_images(tmp_path):
    given = images()
    split = Split(
        images=given, target=np.zeros(5, np.int32), ids=np.array([str(i) for i in range(5)])
    )
    made = []

    def kept(split, name="hog"):
        return kept_descriptors(
            tmp_path, name, split, lambda text: None, lambda *args: made.append(name),
            lambda *took: None,
        )  # fmt: skip

    first = kept(split)
    assert len(made) == 1
    np.testing.assert_array_equal(first, described_all("hog", given))
    np.testing.assert_array_equal(kept(split), first)
    assert len(made) == 1
    changed = given.copy()
    changed[2, 5, 5] ^= 255
    other = kept(Split(images=changed, target=split.target, ids=split.ids))
    assert len(made) == 2 and not np.array_equal(other[2], first[2])
    assert kept(split, "lbp").shape == (5, 944) and len(made) == 3
