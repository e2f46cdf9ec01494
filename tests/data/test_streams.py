"""Streamed images and masks equal those in memory; batches read ahead; memory stays flat."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from medtl_jax.data.images import decode_many
from medtl_jax.data.loader import evaluation_batches, training_indices
from medtl_jax.data.masks import decode_masks
from medtl_jax.data.streams import Streamed, open_images, open_masks, select, stream_batches
from medtl_jax.errors import UserError

SIZE = 16


@pytest.fixture
def files(tmp_path):
    """Colour, grey, transparent and 16-bit images of several sizes, 24 in all."""
    rng = np.random.default_rng(3)
    paths = []
    for number in range(24):
        height, width = rng.integers(10, 40, 2)
        pixels = rng.integers(0, 256, (height, width, 4), np.uint8)
        deep = rng.integers(0, 2**16, (height, width), np.uint16)
        kinds = (pixels[..., :3], pixels[..., 0], pixels, deep)
        path = tmp_path / f"{number}.{'jpg' if number % 8 == 0 else 'png'}"
        Image.fromarray(kinds[number % 4]).save(path)
        paths.append(path)
    return paths


@pytest.fixture
def mask_files(tmp_path):
    rng = np.random.default_rng(4)
    paths = [tmp_path / f"mask{number}.png" for number in range(20)]
    for path in paths:
        Image.fromarray(rng.integers(0, 3, (30, 20), np.uint8)).save(path)
    return paths


def prefetching():
    return [thread for thread in threading.enumerate() if "grain" in thread.name]


def wait_for_end_of_threads():
    stop = time.monotonic() + 5
    while prefetching() and time.monotonic() < stop:
        time.sleep(0.01)
    return prefetching()


# ---- arrays --------------------------------------------------------------------------------------


def test_streamed_images_equal_those_in_memory(files):
    expected, notes = decode_many(files, SIZE)
    images, streamed_notes = open_images(files, SIZE, limit_bytes=1000)
    assert isinstance(images, Streamed)
    assert images.shape == expected.shape == (24, SIZE, SIZE, 3)
    assert images.dtype == expected.dtype and len(images) == 24
    assert len(notes) == 3 and streamed_notes[:-1] == notes
    assert "24 images" in streamed_notes[-1] and "data.cache_gb" in streamed_notes[-1]
    for rows in (
        slice(None),
        slice(5, 9),
        slice(20, 99, 3),
        slice(3, 3),
        [4, 0, -1, 4],
        np.arange(24) % 5 == 0,
        np.array([[1, 2], [3, 1]], np.int32),
        7,
        np.int64(-2),
    ):
        np.testing.assert_array_equal(images[rows], expected[rows], strict=True)
    for threads in (1, 3):
        np.testing.assert_array_equal(images.read(slice(1, 20), threads), expected[1:20])


@pytest.mark.parametrize("channels", [1, 3])
def test_streamed_images_of_a_given_number_of_channels(files, channels):
    expected, notes = decode_many(files, SIZE, channels=channels)
    images, streamed_notes = open_images(files, SIZE, channels=channels, limit_bytes=1000)
    np.testing.assert_array_equal(images[:], expected, strict=True)
    assert streamed_notes[:-1] == notes


def test_the_limit_counts_the_channels_that_the_images_have(files):
    grey = [path for number, path in enumerate(files) if number % 4 == 1]
    pixels = len(grey) * SIZE * SIZE
    for limit, kind in ((3 * pixels, np.ndarray), (pixels, np.ndarray), (pixels - 1, Streamed)):
        images, _ = open_images(grey, SIZE, limit_bytes=limit)
        assert isinstance(images, kind) and images.shape == (6, SIZE, SIZE, 1)
        np.testing.assert_array_equal(images[:], decode_many(grey, SIZE)[0])
    # Colour above the limit, and in memory at it: with the notes of the first decoding.
    kept, notes = open_images(files, SIZE, limit_bytes=3 * 24 * SIZE * SIZE)
    assert isinstance(kept, np.ndarray) and notes == decode_many(files, SIZE)[1]


def test_streamed_images_report_what_in_memory_ones_report(files, tmp_path):
    done = []
    open_images(files * 4, SIZE, limit_bytes=0, progress=lambda *told: done.append(told))
    assert [step[:2] for step in done] == [(32, 96), (64, 96), (96, 96)]
    (tmp_path / "5.png").write_bytes(b"no picture")
    files[9].unlink()
    refusals = []
    for limit in (0, 10**9):
        with pytest.raises(UserError) as caught:
            open_images(files, SIZE, limit_bytes=limit)
        refusals.append(str(caught.value))
    assert refusals[0] == refusals[1] and "2 of 24 images cannot be read" in refusals[0]
    dark = tmp_path / "dark.png"
    Image.fromarray(np.full((9, 9), 4000, np.uint16)).save(dark)
    with pytest.raises(UserError, match=r"data\.bit_depth=12"):
        open_images([dark], SIZE, limit_bytes=0)


def test_rows_are_chosen_without_reading_them(files):
    expected, _ = decode_many(files, SIZE)
    images, _ = open_images(files, SIZE, limit_bytes=0)
    rows = np.array([3, 22, 5])
    for path in files[10:20]:
        path.unlink()
    part = select(images, rows)
    assert isinstance(part, Streamed) and part.shape == (3, SIZE, SIZE, 3)
    np.testing.assert_array_equal(part[:], expected[rows])
    np.testing.assert_array_equal(select(images, slice(0, 4))[1:], expected[1:4])
    assert len(select(images, slice(8, 21))) == 13
    np.testing.assert_array_equal(select(expected, rows), expected[rows])
    with pytest.raises(UserError, match=r"10\.png cannot be read: no such file"):
        images[8:14]


def test_misuse_is_refused(files):
    images, _ = open_images(files, SIZE, limit_bytes=0)
    with pytest.raises(TypeError, match="take rows of it"):
        np.asarray(images)
    for rows in (24, [0, 24], (0, slice(None)), 1.5):
        with pytest.raises(IndexError):
            images[rows]


def test_streamed_masks_equal_those_in_memory(mask_files):
    sizes = [(20, 30)] * 20
    expected = decode_masks(mask_files, SIZE, 3)
    at_limit = open_masks(mask_files, SIZE, 3, sizes, limit_bytes=20 * SIZE * SIZE)
    assert isinstance(at_limit, np.ndarray)
    masks = open_masks(mask_files, SIZE, 3, sizes, limit_bytes=20 * SIZE * SIZE - 1)
    assert isinstance(masks, Streamed) and masks.shape == (20, SIZE, SIZE)
    np.testing.assert_array_equal(at_limit, expected, strict=True)
    np.testing.assert_array_equal(masks[:], expected, strict=True)
    assert set(np.unique(masks[:3]).tolist()) == {0, 1, 2}
    sizes[7] = (30, 20)
    for limit in (0, 10**9):
        with pytest.raises(UserError, match=r"1 of 20 masks .*mask7\.png \(.*20 x 30 .*30 x 20"):
            open_masks(mask_files, SIZE, 3, sizes, limit_bytes=limit)


# ---- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "buffer"), [(0, 4), (1, 1), (3, 1)])
def test_batches_are_those_of_arrays_in_memory(files, mask_files, threads, buffer):
    images, _ = open_images(files[:20], SIZE, limit_bytes=0)
    masks = open_masks(mask_files, SIZE, 3, limit_bytes=0)
    labels = np.arange(20, dtype=np.int32)
    indices = training_indices(seed=1, first_step=2, steps=9, examples=20, batch_size=8)
    arrays = {"image": images, "target": masks, "label": labels}
    batches = list(stream_batches(arrays, indices, threads=threads, buffer=buffer))
    whole_images, whole_masks = images[:], masks[:]
    assert len(batches) == 9
    for batch, rows in zip(batches, indices, strict=True):
        assert list(batch) == ["image", "target", "label"]
        np.testing.assert_array_equal(batch["image"], whole_images[rows], strict=True)
        np.testing.assert_array_equal(batch["target"], whole_masks[rows], strict=True)
        np.testing.assert_array_equal(batch["label"], rows, strict=True)
    assert wait_for_end_of_threads() == []


def test_evaluation_batches_give_each_image_once(files):
    images, _ = open_images(files, SIZE, limit_bytes=0)
    batches = evaluation_batches(24, 7)
    read = [batch["image"] for batch in stream_batches({"image": images}, batches.indices)]
    np.testing.assert_array_equal(np.concatenate(read)[batches.mask.ravel()], images[:])


def test_an_abandoned_stream_ends_its_threads(files):
    images, _ = open_images(files, SIZE, limit_bytes=0)
    indices = np.zeros((10_000, 8), np.int32)
    stream = stream_batches({"image": images}, indices, threads=2, buffer=3)
    next(stream)
    assert prefetching()
    stream.close()
    assert wait_for_end_of_threads() == []
    for _ in stream_batches({"image": images}, indices, threads=2, buffer=3):
        break
    assert wait_for_end_of_threads() == []


def test_a_file_that_goes_bad_on_the_way_is_named(files):
    images, _ = open_images(files, SIZE, limit_bytes=0)
    files[4].write_bytes(b"gone bad")
    stream = stream_batches({"image": images}, np.arange(24).reshape(12, 2))
    assert [next(stream)["image"].shape[0] for _ in range(2)] == [2, 2]
    with pytest.raises(UserError, match=r"4\.png cannot be read: not a PNG"):
        next(stream)
    assert wait_for_end_of_threads() == []
    with pytest.raises(IndexError):
        list(stream_batches({"image": images}, np.array([[0], [24]])))


# ---- memory --------------------------------------------------------------------------------------

CHILD = """
import pathlib, resource, sys
import numpy as np
from medtl_jax.data.streams import open_images, stream_batches

def peak():  # MiB
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

files = sorted(pathlib.Path(sys.argv[1]).glob("*.png"))
# Warm: libraries loaded, threads started, decoders' buffers taken.
warm, _ = open_images(files, 256, limit_bytes=0)
list(stream_batches({"image": warm}, np.arange(32).reshape(4, 8) % len(files), threads=2))
before = peak()
images, _ = open_images(files * (1200 // len(files)), 256, limit_bytes=50 * 2**20)
total = 0
indices = np.random.default_rng(0).permutation(len(images)).reshape(-1, 8)
for batch in stream_batches({"image": images}, indices, threads=2):
    total += len(batch["image"])
print(total, np.prod(images.shape) / 2**20, peak() - before)
"""


def test_memory_stays_flat_on_a_set_of_four_times_the_limit(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    total, decoded, grown = map(float, done.stdout.split())
    assert total == 1200 and decoded > 4 * 50
    assert grown < 40, f"{grown:.0f} MiB more for {decoded:.0f} MiB of images"
