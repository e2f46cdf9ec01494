"""Decoding of image files, against hand-computed values and plain Pillow."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from medtl_jax.data.images import (
    decode_image,
    decode_many,
    resize_many,
)
from medtl_jax.data.prediction import read_images_for_prediction
from medtl_jax.errors import UserError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def save(path, pixels, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def bicubic(image, size):
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def png(width, height, bits, colour_type, rows):
    """A PNG written by hand: Pillow cannot write 16-bit colour."""

    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    body = zlib.compress(rows)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp"])
@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "colour"])
def test_eight_bit_equals_pillow(tmp_path, suffix, pixels):
    # Lossy WebP would colour the grey image a little.
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"x.{suffix}", pixels, **options)
    mode = "L" if pixels.ndim == 2 else "RGB"
    with Image.open(path) as image:
        expected = bicubic(image.convert(mode), 9)
    result = decode_image(path, 9)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(decode_image(path.read_bytes(), 9), expected)


def test_colour_file_with_equal_channels_is_grey(tmp_path):
    path = save(tmp_path / "x.jpg", np.repeat(GREY[..., None], 3, axis=2), quality=95)
    with Image.open(path) as image:
        assert image.mode == "RGB"
        expected = bicubic(image.convert("L"), 12)
    np.testing.assert_array_equal(decode_image(path, 12), expected)


def test_palette_alpha_cmyk_and_bilevel(tmp_path):
    square = COLOUR[:, :20]
    palette = Image.fromarray(square).quantize(16)
    np.testing.assert_array_equal(
        decode_image(save(tmp_path / "p.png", palette), 20), np.asarray(palette.convert("RGB"))
    )
    clear = save(tmp_path / "t.png", palette, transparency=bytes(range(16)))
    np.testing.assert_array_equal(decode_image(clear, 20), np.asarray(palette.convert("RGB")))
    rgba = np.dstack([square, np.full((20, 20), 7, np.uint8)])
    np.testing.assert_array_equal(decode_image(save(tmp_path / "a.png", rgba), 20), square)
    la = Image.merge("LA", [Image.fromarray(GREY[:, :20]), Image.new("L", (20, 20), 9)])
    np.testing.assert_array_equal(decode_image(save(tmp_path / "l.png", la), 20), GREY[:, :20])
    cmyk = Image.fromarray(square).convert("CMYK")
    np.testing.assert_array_equal(decode_image(save(tmp_path / "c.tif", cmyk), 20), square)
    bits = Image.fromarray(GREY[:, :20] > 127)
    np.testing.assert_array_equal(
        decode_image(save(tmp_path / "b.png", bits), 20), (GREY[:, :20] > 127) * np.uint8(255)
    )


def test_alpha_is_noted(tmp_path):
    rgba = np.dstack([COLOUR, GREY])
    paths = [save(tmp_path / "a.png", rgba), save(tmp_path / "b.png", COLOUR)]
    _, notes = decode_many(paths, 8)
    assert notes == ("1 of 2 images have an alpha channel, which was dropped",)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_sixteen_bit_values(tmp_path, suffix, dtype):
    # 65535 -> 255, 32768 / 257 = 127.502 -> 128, 32767 / 257 = 127.498 -> 127, 257 -> 1.
    values = np.array([[65535, 32768], [32767, 257]], dtype)
    path = save(tmp_path / f"x.{suffix}", values)
    assert decode_image(path, 2).tolist() == [[255, 128], [127, 1]]


def test_twelve_bit_values_in_sixteen_bit_and_int32_files(tmp_path):
    # 4095 -> 255, 2048 / 4095 * 255 = 127.53 -> 128, 100 / 4095 * 255 = 6.23 -> 6.
    values = [[4095, 2048], [100, 0]]
    deep = save(tmp_path / "u.png", np.array(values, np.uint16))
    wide = save(tmp_path / "i.tif", np.array(values, np.int32))
    for path in (deep, wide):
        assert decode_image(path, 2, bit_depth=12).tolist() == [[255, 128], [6, 0]]


def test_sixteen_bit_is_resized_before_it_is_rounded(tmp_path):
    values = RNG.integers(0, 2**16, (40, 40)).astype(np.uint16)
    path = save(tmp_path / "x.png", values)
    exact = bicubic(Image.fromarray(values.astype(np.float32)), 16) * (255 / 65535)
    expected = np.rint(np.clip(exact, 0, 255)).astype(np.uint8)
    early = bicubic(Image.fromarray((values // 256).astype(np.uint8)), 16)
    np.testing.assert_array_equal(decode_image(path, 16), expected)
    assert (early != expected).any()


@pytest.mark.parametrize(("suffix", "orientation"), [("jpg", 6), ("png", 3), ("tif", 8)])
def test_exif_orientation(tmp_path, suffix, orientation):
    turns = {6: 3, 3: 2, 8: 1}[orientation]
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:8, :8], pixels[:8, 8:] = 250, 120
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if suffix == "jpg" else {}
    path = save(tmp_path / f"x.{suffix}", pixels, exif=exif, **options)
    upright = np.rot90(pixels, turns).astype(int)
    assert np.abs(decode_image(path, 16).astype(int) - upright).max() <= 3


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("not an image")


def truncated(path):
    save(path, RNG.integers(0, 256, (200, 200), dtype=np.uint8), format="JPEG")
    path.write_bytes(path.read_bytes()[:3000])


def bomb(path):
    path.write_bytes(png(60_000, 60_000, 1, 0, b"\0" * 100))


def quiet_bomb(path):
    # 110 million pixels: Pillow itself would only warn.
    path.write_bytes(png(11_000, 10_000, 1, 0, b"\0" * 100))


def frames(path):
    first, second = Image.fromarray(GREY), Image.fromarray(255 - GREY)
    first.save(path, format="TIFF", save_all=True, append_images=[second])


def animation(path):
    first, second = Image.fromarray(GREY), Image.fromarray(255 - GREY)
    first.save(path, format="GIF", save_all=True, append_images=[second])


def floats(path):
    save(path, GREY.astype(np.float32), format="TIFF")


def white_is_zero(path):
    save(path, GREY.astype(np.uint16), format="TIFF", tiffinfo={262: 0})
    # Pillow writes its own photometric tag; patch entry 262 (SHORT, count 1) to 0.
    data = path.read_bytes()
    path.write_bytes(
        data.replace(struct.pack("<HHII", 262, 3, 1, 1), struct.pack("<HHII", 262, 3, 1, 0))
    )


def deep_colour(path):
    path.write_bytes(png(1, 1, 16, 2, b"\0" + b"\x12\x34" * 3))


def negative(path):
    save(path, np.array([[-1, 5]], np.int32), format="TIFF")


def too_high(path):
    save(path, np.array([[70_000, 5]], np.int32), format="TIFF")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (empty, "the file is empty"),
        (text, "not a PNG, JPEG, TIFF, BMP, WebP or GIF image"),
        (truncated, "truncated"),
        (bomb, "more than 100,000,000 pixels"),
        (quiet_bomb, "11000 x 10000 is more than 100,000,000 pixels"),
        (frames, "2 frames"),
        (animation, "2 frames"),
        (floats, "floating-point pixels"),
        (white_is_zero, "white as zero"),
        (deep_colour, "16-bit colour"),
        (negative, "negative value -1"),
        (too_high, "value 70000 is above 65535, the largest for data.bit_depth=16"),
    ],
)
def test_unusable_file_is_one_line_with_its_name(tmp_path, make, reason):
    path = tmp_path / "case.png"
    make(path)
    with pytest.raises(UserError) as caught:
        decode_image(path, 8)
    message = str(caught.value)
    assert str(path) in message and reason in message and "\n" not in message
    good = save(tmp_path / "good.png", GREY)
    with pytest.raises(UserError, match="1 of 2 images cannot be read, first: ") as caught:
        decode_many([good, path], 8)
    assert str(path) in str(caught.value) and reason in str(caught.value)


def test_bit_flips_never_escape_as_another_error(tmp_path):
    files = [
        save(tmp_path / "x.png", COLOUR).read_bytes(),
        save(tmp_path / "x.jpg", COLOUR).read_bytes(),
        save(tmp_path / "x.tif", GREY.astype(np.uint16), compression="tiff_lzw").read_bytes(),
    ]
    outcomes = set()
    for data in files:
        for _ in range(60):
            broken = bytearray(data)
            for position in RNG.integers(0, len(data), 4):
                broken[position] ^= int(RNG.integers(1, 256))
            try:
                outcomes.add(decode_image(bytes(broken), 8).dtype.name)
            except UserError as error:
                assert "\n" not in str(error)
                outcomes.add("refused")
    assert outcomes == {"uint8", "refused"}


def test_phone_photograph_with_previews_is_its_first_frame(tmp_path):
    path, preview = tmp_path / "x.jpg", Image.fromarray(255 - COLOUR)
    Image.fromarray(COLOUR).save(path, format="MPO", save_all=True, append_images=[preview])
    with Image.open(path) as image:
        assert image.format == "MPO" and image.n_frames == 2
        expected = bicubic(image, 9)
    np.testing.assert_array_equal(decode_image(path, 9), expected)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.png cannot be read: no such file"):
        decode_image(tmp_path / "gone.png", 8)


def test_many_keeps_order_and_reports_progress(tmp_path):
    paths = [save(tmp_path / f"{n}.png", np.full((4, 4), n, np.uint8)) for n in range(70)]
    calls = []
    images, notes = decode_many(paths[::-1], 4, progress=lambda *call: calls.append(call))
    assert images.shape == (70, 4, 4, 1) and notes == ()
    assert images[:, 0, 0, 0].tolist() == list(range(69, -1, -1))
    assert [call[:2] for call in calls] == [(32, 70), (64, 70), (70, 70)]


@pytest.mark.parametrize("colour_at", [0, 1, 2])
def test_grey_and_colour_mix_becomes_rgb(tmp_path, colour_at):
    sources = [GREY, 255 - GREY]
    sources.insert(colour_at, COLOUR)
    paths = [save(tmp_path / f"{n}.png", pixels) for n, pixels in enumerate(sources)]
    images, notes = decode_many(paths, 10)
    assert images.shape == (3, 10, 10, 3)
    for image, pixels in zip(images, sources, strict=True):
        np.testing.assert_array_equal(image, bicubic(Image.fromarray(pixels).convert("RGB"), 10))
    assert notes == ("2 of 3 images are grey, repeated in three channels",)


def test_channels_can_be_asked_for(tmp_path):
    paths = [save(tmp_path / "g.png", GREY[:, :20]), save(tmp_path / "c.png", COLOUR[:, :20])]
    grey, _ = decode_many(paths, 20, channels=1)
    np.testing.assert_array_equal(grey[0, ..., 0], GREY[:, :20])
    luma = np.asarray(Image.fromarray(COLOUR[:, :20]).convert("L"))
    np.testing.assert_array_equal(grey[1, ..., 0], luma)
    rgb, _ = decode_many(paths[:1], 20, channels=3)
    np.testing.assert_array_equal(rgb[0], np.repeat(GREY[:, :20, None], 3, axis=2))


def test_twelve_bit_set_is_refused_at_sixteen(tmp_path):
    low = save(tmp_path / "low.png", np.array([[4095, 0]], np.uint16))
    eight = save(tmp_path / "eight.png", GREY)
    with pytest.raises(UserError, match=r"only 0\.\.4095 .* set data\.bit_depth=12"):
        decode_many([low, eight], 2)
    images, notes = decode_many([low], 2, bit_depth=12)
    assert images.max() == 255 and "1 of 1 images are 16-bit: 0..4095" in notes[0]
    high = save(tmp_path / "high.png", np.array([[4096, 0]], np.uint16))
    assert len(decode_many([low, high], 2)[0]) == 2
    dark = save(tmp_path / "dark.png", np.array([[200, 0]], np.uint16))
    with pytest.raises(UserError, match=r"set data\.bit_depth=8"):
        decode_many([dark], 2)


def test_set_larger_than_memory_is_refused():
    with pytest.raises(UserError, match=r"1000000 images of 16384 x 16384 x 1 need .* GiB"):
        decode_many(["x.png"] * 1_000_000, 16_384)


@pytest.mark.parametrize("shape", [(40, 9, 11), (40, 9, 11, 1), (40, 9, 11, 3)])
def test_resize_many_equals_pillow(shape):
    images = RNG.integers(0, 256, shape, dtype=np.uint8)
    resized = resize_many(images, 6)
    assert resized.shape == (40, 6, 6, shape[3] if len(shape) == 4 else 1)
    expected = bicubic(Image.fromarray(images[37].squeeze()), 6)
    np.testing.assert_array_equal(resized[37].squeeze(), expected)


def test_prediction_reads_a_tree_or_a_file(tmp_path):
    (tmp_path / "b" / ".cache").mkdir(parents=True)
    save(tmp_path / "b" / "2.PNG", COLOUR)
    save(tmp_path / "a.jpg", GREY)
    save(tmp_path / "b" / ".cache" / "x.png", GREY)
    save(tmp_path / ".hidden.png", GREY)
    (tmp_path / "notes.txt").write_text("no image")
    images, ids, _ = read_images_for_prediction(tmp_path, 8)
    assert ids.tolist() == ["a.jpg", "b/2.PNG"] and images.shape == (2, 8, 8, 3)
    images, _, _ = read_images_for_prediction(tmp_path, 8, channels=1)
    assert images.shape == (2, 8, 8, 1)
    images, ids, _ = read_images_for_prediction(tmp_path / "a.jpg", 8)
    assert ids.tolist() == ["a.jpg"] and images.shape == (1, 8, 8, 1)


def test_prediction_takes_a_dark_sixteen_bit_image(tmp_path):
    path = save(tmp_path / "dark.png", np.full((2, 2), 2570, np.uint16))
    images, _, _ = read_images_for_prediction(path, 2)
    assert images.ravel().tolist() == [10] * 4


def test_prediction_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="no images"):
        read_images_for_prediction(tmp_path, 8)
    with pytest.raises(UserError, match="no such file or folder"):
        read_images_for_prediction(tmp_path / "gone", 8)


def test_bytes_without_a_name():
    with pytest.raises(UserError, match="image bytes cannot be read"):
        decode_image(io.BytesIO(b"nothing").getvalue(), 8)
