"""Image files as uint8 arrays: decoding, bit depth, orientation, resizing, many at once."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from medtl_jax.data.imagefile import (
    DEEP_MODES,
    MAX_PIXELS,
    UnreadableError,
    decoder_warnings_off,
    open_checked,
)
from medtl_jax.data.planes import Grey, ImageSource, Plane
from medtl_jax.data.survey import Survey
from medtl_jax.errors import UserError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"})

Progress = Callable[[int, int, str], None]
_Result = TypeVar("_Result")

_COLOUR_MODES = frozenset({"RGB", "RGBX", "RGBA", "RGBa", "LA", "La", "P", "PA", "CMYK", "YCbCr"})
BLOCK = 32  # images a thread takes at a time


@dataclasses.dataclass(frozen=True, slots=True)
class _Decoded:
    """One image: pixels `[s, s]` or `[s, s, 3]`, and what its file was like.

    `highest` is the largest raw value of a 16-bit file (None for an 8-bit one), `how` what a plane
    says of its mapping to 0..255 ("" for a picture).
    """

    pixels: np.ndarray
    highest: int | None = None
    alpha: bool = False
    how: str = ""

    def without_pixels(self) -> "_Decoded":
        """Returns the same with one pixel alone, which tells grey from colour."""
        return dataclasses.replace(self, pixels=self.pixels[:1, :1].copy())


def decode_image(source: ImageSource | bytes, image_size: int, bit_depth: int = 16) -> np.ndarray:
    """Returns one image as uint8, `[s, s]` if grey or `[s, s, 3]` if coloured.

    The image is turned upright (EXIF), loses its alpha channel, and is squeezed to
    `image_size` by Pillow's bicubic filter (the aspect ratio is not kept). A colour file whose
    three channels are equal is grey. 16-bit grey files are mapped from
    0..2**bit_depth - 1 to 0..255 in float32 and rounded once, after resizing.

    Args:
      source: a PNG, JPEG, TIFF, BMP, WebP or single GIF image: its path, its bytes, or what
        opens as a path does; or a plane of another file, of float values 0..255.
      image_size: s, height and width of the result in pixels.
      bit_depth: bits in use in 16-bit files, 8 to 16; 8-bit files do not need it.

    Raises:
      UserError: the file cannot be read, is not an image, is truncated, has more than
        `MAX_PIXELS` pixels, several frames, floats, 16-bit colour, or values above bit_depth.
    """
    with decoder_warnings_off():
        return decode_in_thread(source, image_size, bit_depth)


def decode_in_thread(
    source: ImageSource | bytes, image_size: int, bit_depth: int = 16
) -> np.ndarray:
    """Returns what `decode_image` does, with the same arguments and errors, from any thread.

    Python's warning filters belong to the whole process: here they are left alone, and Pillow may
    warn of an image with 89 million pixels or more.
    """
    result = _decode_or_reason(source, image_size, bit_depth)
    if isinstance(result, str):
        name = "image bytes" if isinstance(source, bytes) else source
        raise UserError(f"{name} cannot be read: {result}")
    return result.pixels


def decode_many(
    paths: Sequence[ImageSource],
    image_size: int,
    bit_depth: int = 16,
    *,
    channels: int | None = None,
    check_depth: bool = True,
    progress: Progress | None = None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns `(images, notes)`: uint8 `[n, s, s, c]` in the order of `paths`, and what was done.

    Files are decoded as by `decode_image`, on one thread a CPU core.

    Args:
      paths: the n files.
      image_size: s.
      bit_depth: bits in use in 16-bit files.
      channels: c = 1 or 3; None takes 1 if every image is grey and else 3, grey ones repeated.
      check_depth: refuse a set whose 16-bit images would come out black because they hold
        12 bits or fewer. Needs the whole set: turn it off for single images.
      progress: called as `progress(done, total, text)`.

    Raises:
      UserError: some files cannot be read (how many, and why the first), `check_depth` found a
        wrong bit_depth, or the result does not fit in memory.
    """
    paths = list(paths)
    images = allocate_images((len(paths), image_size, image_size, channels or 1))
    survey = Survey(bit_depth)
    results = _decode_in_order(paths, image_size, bit_depth, progress)
    with decoder_warnings_off(), contextlib.closing(results):
        for index, result in enumerate(results):
            if not survey.add(paths[index], result):
                continue
            if channels is None and result.pixels.ndim == 3 and images.shape[-1] == 1:
                images = _widen(images, index)
            images[index] = with_channels(result.pixels, images.shape[-1])
    survey.check(check_depth)
    return images, survey.notes(widened=channels is None and images.shape[-1] == 3)


def survey_many(
    paths: Sequence[ImageSource],
    image_size: int,
    bit_depth: int = 16,
    *,
    channels: int | None = None,
    check_depth: bool = True,
    progress: Progress | None = None,
) -> tuple[int, tuple[str, ...]]:
    """Returns `(c, notes)`, those that `decode_many` gives for the same files, and keeps no image.

    Arguments and errors are those of `decode_many`: every file is decoded once, a few at a time.
    """
    paths = list(paths)
    survey = Survey(bit_depth)
    results = _decode_in_order(
        paths, image_size, bit_depth, progress, reduce=_Decoded.without_pixels
    )
    with decoder_warnings_off(), contextlib.closing(results):
        for path, result in zip(paths, results, strict=True):
            survey.add(path, result)
    survey.check(check_depth)
    widened = channels is None and survey.channels == 3
    return channels or survey.channels, survey.notes(widened)


def resize_many(
    images: np.ndarray, image_size: int, progress: Progress | None = None
) -> np.ndarray:
    """Returns uint8 `[n, s, s, c]`: the images `[n, h, w]` or `[n, h, w, c]`, resized (bicubic).

    Images of the right size come back as they are, without a copy.
    """
    if images.ndim == 3:
        images = images[..., None]
    total, height, width, channels = images.shape
    if height == width == image_size:
        return np.ascontiguousarray(images)
    resized = allocate_images((total, image_size, image_size, channels))

    def resize_block(start: int) -> int:
        stop = min(start + BLOCK, total)
        for index in range(start, stop):
            pixels = images[index, ..., 0] if channels == 1 else images[index]
            picture = _resize(Image.fromarray(np.ascontiguousarray(pixels)), image_size)
            resized[index] = np.asarray(picture).reshape(resized.shape[1:])
        return stop

    for done in in_order(resize_block, total):
        if progress:
            progress(done, total, "resizing images")
    return resized


def allocate_images(shape: tuple[int, ...]) -> np.ndarray:
    """Returns an uninitialised uint8 array; UserError where it exceeds this machine's memory."""
    need, have = math.prod(shape), physical_memory()
    if need > have:
        raise UserError(
            f"{shape[0]} images of {shape[1]} x {shape[2]} x {shape[3]} need "
            f"{need / 2**30:.1f} GiB and this machine has {have / 2**30:.1f}: "
            "lower model.image_size or use a smaller set"
        )
    return np.empty(shape, np.uint8)


def one_line(error: Exception) -> str:
    """Returns an exception's message on one line, or its type's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def physical_memory() -> float:
    """Returns the machine's memory in bytes, infinity where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def _decode_in_order(
    paths: Sequence[ImageSource],
    image_size: int,
    bit_depth: int,
    progress: Progress | None,
    reduce: Callable[[_Decoded], _Decoded] = lambda decoded: decoded,
) -> Iterator[_Decoded | str]:
    """Yields `reduce(image)`, or in a few words why there is none, for each of `paths`."""
    total = len(paths)

    def decode_block(start: int) -> list[_Decoded | str]:
        block = paths[start : start + BLOCK]
        results = [_decode_or_reason(path, image_size, bit_depth) for path in block]
        return [result if isinstance(result, str) else reduce(result) for result in results]

    done = 0
    for block in in_order(decode_block, total):
        done += len(block)
        if progress:
            progress(done, total, "reading images")
        yield from block


def in_order(work: Callable[[int], _Result], total: int) -> Iterator[_Result]:
    """Yields `work(start)` of each block of `BLOCK` images, in order, from one thread a core."""
    # Plugins are registered before the threads start: registering is not thread-safe.
    Image.init()
    with (
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        contextlib.closing(pool.map(work, range(0, total, BLOCK))) as results,
    ):
        yield from results


def _decode_or_reason(
    source: ImageSource | bytes, image_size: int, bit_depth: int
) -> _Decoded | str:
    """Returns the decoded image, or in a few words why there is none."""
    return attempt(lambda: _decode(source, image_size, bit_depth))


def attempt(work: Callable[[], _Result]) -> _Result | str:
    """Returns what `work`, which decodes one file, returns, or in a few words why it failed."""
    try:
        return work()
    except UnreadableError as error:
        return str(error)
    except UnidentifiedImageError:
        return "not a PNG, JPEG, TIFF, BMP, WebP or GIF image"
    except Image.DecompressionBombError:
        return f"more than {MAX_PIXELS:,} pixels"
    except FileNotFoundError:
        return "no such file"
    except Exception as error:
        # Damaged files make Pillow's decoders raise almost any type (SyntaxError, struct.error,
        # IndexError, ...): whichever it is, this one file is bad and the user needs its name.
        return one_line(error)


def _decode(source: ImageSource | bytes, image_size: int, bit_depth: int) -> _Decoded:
    if isinstance(source, Plane):
        grey = source.read()
        return _Decoded(_from_plane(grey, image_size), how=grey.how)
    with open_checked(source) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode in DEEP_MODES:
            return _deep_to_grey(image, image_size, bit_depth)
        return _Decoded(_eight_bit(image, image_size), alpha=image.has_transparency_data)


def _from_plane(grey: Grey, image_size: int) -> np.ndarray:
    """Returns uint8 pixels of float ones, rounded once, after resizing."""
    parts = grey.values[..., None] if grey.values.ndim == 2 else grey.values
    resized = [
        np.asarray(_resize(Image.fromarray(np.ascontiguousarray(parts[..., k])), image_size))
        for k in range(parts.shape[-1])
    ]
    pixels = np.rint(np.clip(np.stack(resized, axis=-1), 0.0, 255.0)).astype(np.uint8)
    return pixels if grey.channels else _grey_if_equal(pixels)


def _grey_if_equal(pixels: np.ndarray) -> np.ndarray:
    """Returns `[s, s]` of `[s, s, c]` whose channels are equal, else the pixels."""
    return pixels[..., 0] if (pixels == pixels[..., :1]).all() else pixels


def _eight_bit(image: Image.Image, image_size: int) -> np.ndarray:
    if image.mode in ("1", "L"):
        return np.asarray(_resize(image.convert("L"), image_size))
    if image.mode not in _COLOUR_MODES:
        raise UnreadableError(f"pixels of Pillow mode {image.mode}: save as 8-bit grey or RGB")
    if image.mode in ("P", "PA", "La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode == "LA":
        return np.asarray(_resize(image.getchannel("L"), image_size))
    return _grey_if_equal(np.asarray(_resize(image.convert("RGB"), image_size)))


def _deep_to_grey(image: Image.Image, image_size: int, bit_depth: int) -> _Decoded:
    values = np.asarray(image)
    lowest, highest, limit = int(values.min()), int(values.max()), 2**bit_depth - 1
    if lowest < 0:
        raise UnreadableError(f"negative value {lowest}: shift the values to start at 0")
    if highest > limit:
        raise UnreadableError(
            f"value {highest} is above {limit}, the largest for data.bit_depth={bit_depth}"
        )
    resized = np.asarray(_resize(Image.fromarray(values.astype(np.float32)), image_size))
    grey = np.rint(np.clip(resized * (255.0 / limit), 0.0, 255.0)).astype(np.uint8)
    return _Decoded(grey, highest=highest)


def _resize(image: Image.Image, image_size: int) -> Image.Image:
    return image.resize((image_size, image_size), Image.Resampling.BICUBIC)


def to_grey(images: np.ndarray) -> np.ndarray:
    """Returns uint8 `[n, s, s, 1]` of `[n, s, s, 1 or 3]`: ITU-R 601 luma, as for single files."""
    if images.shape[-1] == 1:
        return images
    return np.stack([with_channels(image, 1) for image in images])


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Returns uint8 `[s, s, c]` of a decoded image, c = 1 for `channels=1` or a grey image.

    A grey image keeps its one channel, which NumPy broadcasts to three; colour becomes grey by
    ITU-R 601 luma.
    """
    if pixels.ndim == 3 and channels == 1:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _widen(grey: np.ndarray, filled: int) -> np.ndarray:
    """Returns an RGB array with the first `filled` grey images repeated in three channels."""
    wide = allocate_images((*grey.shape[:-1], 3))
    wide[:filled] = grey[:filled]
    return wide
