"""Mask files: which values are which classes, size, orientation and resizing."""

import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medtl_jax.data.imagefile import UnreadableError
from medtl_jax.data.images import decode_image
from medtl_jax.data.masks import (
    decode_mask,
    decode_masks,
    different_values,
    resize_masks,
    to_classes,
    upright_sizes,
)
from medtl_jax.data.prediction import original_sizes, read_images_for_prediction
from medtl_jax.errors import UserError

CLASSES = np.random.default_rng(0).integers(0, 3, (12, 12)).astype(np.uint8)
BINARY = (CLASSES > 1).astype(np.uint8)


def save(path, pixels, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def low_bit_png(path, values, bits):
    """A grey PNG of 2 or 4 bits a pixel, written by hand: Pillow writes 1, 8 and 16."""

    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    rows = b""
    for row in values.tolist():
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def palette(values):
    image = Image.new("P", values.shape[::-1])
    image.putdata(values.ravel().tolist())
    image.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    return image


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_grey_values_are_the_classes(tmp_path, suffix):
    mask = decode_mask(save(tmp_path / f"m.{suffix}", CLASSES), 12, 3)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, CLASSES)


def test_other_ways_to_store_a_class(tmp_path):
    grey = Image.fromarray(CLASSES)
    files = {
        "palette": save(tmp_path / "p.png", palette(CLASSES)),
        "two bits": low_bit_png(tmp_path / "2.png", CLASSES, 2),
        "four bits": low_bit_png(tmp_path / "4.png", CLASSES, 4),
        "sixteen bits": save(tmp_path / "16.png", CLASSES.astype(np.uint16)),
        "rgb": save(tmp_path / "c.png", np.repeat(CLASSES[..., None], 3, 2)),
        "rgba": save(tmp_path / "a.png", np.dstack([CLASSES] * 3 + [np.full((12, 12), 9, "u1")])),
        "alpha": save(tmp_path / "l.png", Image.merge("LA", [grey, Image.new("L", (12, 12))])),
    }
    for kind, path in files.items():
        np.testing.assert_array_equal(decode_mask(path, 12, 3), CLASSES, kind)
        np.testing.assert_array_equal(decode_mask(path.read_bytes(), 12, 3), CLASSES, kind)


def test_two_classes_as_black_and_white(tmp_path):
    white = save(tmp_path / "w.png", BINARY * np.uint8(255))
    bits = save(tmp_path / "b.png", Image.fromarray(BINARY * np.uint8(255)).convert("1"))
    tiff = save(tmp_path / "b.tif", Image.fromarray(BINARY.astype(bool)))
    ones = save(tmp_path / "o.png", BINARY)
    for path in (white, bits, tiff, ones):
        np.testing.assert_array_equal(decode_mask(path, 12, 2), BINARY)
    assert decode_mask(save(tmp_path / "f.png", np.full((4, 4), 255, "u1")), 4, 2).min() == 1
    assert decode_mask(save(tmp_path / "e.png", np.zeros((4, 4), "u1")), 4, 2).max() == 0
    with pytest.raises(UserError, match=r"values are 0, 255: 3 classes need 0 to 2$"):
        decode_mask(white, 12, 3)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))
def test_resizing_takes_the_pixel_under_the_centre(height, width, size):
    values = np.arange(height * width, dtype=np.uint8).reshape(height, width)
    row, column = np.divmod(resize_masks(values[None], size)[0], width)
    for taken, length, axis in ((row, height, 0), (column, width, 1)):
        # On the border of two pixels either may be taken.
        centres = np.expand_dims((np.arange(size) + 0.5) * length / size, 1 - axis)
        assert (np.abs(centres - (taken + 0.5)) <= 0.5 + 1e-9).all()


def test_files_are_resized_alike(tmp_path):
    path = save(tmp_path / "m.png", CLASSES)
    np.testing.assert_array_equal(decode_mask(path, 5, 3), resize_masks(CLASSES[None], 5)[0])
    masks = decode_masks([path, path], 5, 3, [(12, 12)] * 2)
    assert masks.shape == (2, 5, 5) and masks.dtype == np.uint8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_mask_lies_on_its_turned_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((6, 9), np.uint8)
    pixels[:2, :3] = 255
    image = save(tmp_path / "i.png", pixels, exif=exif)
    mask = save(tmp_path / "m.png", pixels, exif=exif)
    size = (6, 9) if orientation >= 5 else (9, 6)
    assert upright_sizes([image]) == [size] and original_sizes(tmp_path, ["i.png"]) == [size]
    turned = decode_mask(mask, 18, 2, expected_size=size)
    grey = decode_image(image, 18)
    np.testing.assert_array_equal(turned[3:-3:4, 3:-3:4], grey[3:-3:4, 3:-3:4] > 127)


def coloured(path):
    save(path, np.dstack([CLASSES, CLASSES, CLASSES[::-1]]))


def smooth(path):
    save(path, np.arange(144, dtype=np.uint8).reshape(12, 12))


def negative(path):
    save(path, np.full((12, 12), -1, np.int32), format="TIFF")


def cmyk(path):
    save(path, Image.new("CMYK", (12, 12)), format="TIFF")


def other_size(path):
    save(path, CLASSES[:10])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (coloured, "a coloured mask"),
        (smooth, "its values are 0, 1, 2, 3, 4, 5, ...: 3 classes need 0 to 2"),
        (negative, "its values are -1"),
        (cmyk, "Pillow mode CMYK"),
        (other_size, "the mask is 12 x 10 pixels and its image 12 x 12"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_text("x"), "not a PNG"),
        (lambda path: None, "no such file"),
    ],
)
def test_unusable_mask_is_one_line_with_its_name(tmp_path, make, reason):
    path, good = tmp_path / "case.png", save(tmp_path / "good.png", CLASSES)
    make(path)
    with pytest.raises(UserError) as caught:
        decode_mask(path, 8, 3, (12, 12))
    message = str(caught.value)
    assert str(path) in message and reason in message and "\n" not in message
    with pytest.raises(UserError, match="1 of 2 masks cannot be used, first: ") as caught:
        decode_masks([good, path], 8, 3, [(12, 12)] * 2)
    assert str(path) in str(caught.value) and reason in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_pipes_and_folders_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, reason in (("pipe", "it is no regular file"), ("folder", "it is a folder")):
        path = tmp_path / f"{name}.png"
        with pytest.raises(UserError, match=rf"{name}\.png cannot be used as a mask: {reason}"):
            decode_mask(path, 8, 2)
        with pytest.raises(UserError, match=rf"{name}\.png cannot be read: {reason}"):
            decode_image(str(path), 8)
        with pytest.raises(UserError, match=rf"1 of 1 images cannot be read, .*\({reason}"):
            upright_sizes([path])
    with pytest.raises(UserError, match=r"pipe\.png \(it is no regular file"):
        read_images_for_prediction(tmp_path, 8)


def test_two_classes_name_both_encodings(tmp_path):
    path = save(tmp_path / "m.png", CLASSES)
    with pytest.raises(UserError, match="its values are 0, 1, 2: 2 classes need 0 to 1 or 0 and"):
        decode_mask(path, 12, 2)


def test_many_keep_their_order_and_report_progress(tmp_path):
    paths = [save(tmp_path / f"{n}.png", np.full((2, 2), n, np.uint8)) for n in range(70)]
    calls = []
    masks = decode_masks(paths[::-1], 2, 70, progress=lambda *call: calls.append(call))
    assert masks[:, 0, 0].tolist() == list(range(69, -1, -1))
    assert [call[:2] for call in calls] == [(32, 70), (64, 70), (70, 70)]


def test_sizes_of_unreadable_images(tmp_path):
    good = save(tmp_path / "good.png", CLASSES[:5])
    with pytest.raises(UserError, match=r"1 of 2 images cannot be read, first: .*gone\.png \(no"):
        upright_sizes([good, tmp_path / "gone.png"])
    assert upright_sizes([good]) == [(12, 5)]
    with pytest.raises(UserError, match=r"gone\.png \(no such file"):
        original_sizes(tmp_path, ["gone.png"])


def test_masks_are_counted_in_little_memory():
    masks = np.arange(3 * 2**20 + 17, dtype=np.uint8)
    masks[-1] = 200
    tracemalloc.start()
    found = to_classes(masks, 256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, masks)
    # The result, and eight bytes for each pixel of a block of 2^20.
    assert peak < masks.nbytes + 9 * 2**20


@given(st.lists(st.integers(0, 300), min_size=1, max_size=9), st.sampled_from(["u1", "u2", "i8"]))
def test_different_values(values, dtype):
    array = np.array(values).astype(dtype)
    assert different_values(array).tolist() == sorted(set(array.tolist()))


def test_more_classes_than_a_byte_holds():
    with pytest.raises(UnreadableError, match="257 classes are more than a byte"):
        to_classes(np.zeros((2, 2), np.int32), 257)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=6), st.integers(2, 256))
def test_classes_are_taken_or_refused_by_their_values(values, count):
    array = np.array(values, np.int32)
    black_and_white = count == 2 and set(values) <= {0, 255}
    if black_and_white:
        assert to_classes(array, count).tolist() == [value // 255 for value in values]
    elif max(values) < count:
        assert to_classes(array, count).tolist() == values
    else:
        with pytest.raises(UnreadableError, match=f"{count} classes need 0 to {count - 1}"):
            to_classes(array, count)
