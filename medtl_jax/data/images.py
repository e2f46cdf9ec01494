"""Image files as uint8 arrays: decoding, bit depth, orientation, resizing, many at once."""

import contextlib
import dataclasses
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from medtl_jax.errors import UserError
from medtl_jax.files import user_path

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"})
MAX_PIXELS = 100_000_000

Progress = Callable[[int, int, str], None]
_Result = TypeVar("_Result")

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")
_DEEP_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I"})
_COLOUR_MODES = frozenset({"RGB", "RGBX", "RGBA", "RGBa", "LA", "La", "P", "PA", "CMYK", "YCbCr"})
_TIFF_PHOTOMETRIC = 262
_BLOCK = 32


class _UnreadableError(Exception):
    """Why one file cannot be used, without its name."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Decoded:
    """One image: pixels `[s, s]` or `[s, s, 3]`, and what its file was like.

    `highest` is the largest raw value of a 16-bit file (None for an 8-bit one).
    """

    pixels: np.ndarray
    highest: int | None = None
    alpha: bool = False


def decode_image(source: str | Path | bytes, image_size: int, bit_depth: int = 16) -> np.ndarray:
    """Returns one image as uint8, `[s, s]` if grey or `[s, s, 3]` if coloured.

    The image is turned upright (EXIF), loses its alpha channel, and is squeezed to
    `image_size` by Pillow's bicubic filter (the aspect ratio is not kept). A colour file whose
    three channels are equal is grey. 16-bit grey files are mapped from
    0..2**bit_depth - 1 to 0..255 in float32 and rounded once, after resizing.

    Args:
      source: path of a PNG, JPEG, TIFF, BMP, WebP or single GIF image, or its bytes.
      image_size: s, height and width of the result in pixels.
      bit_depth: bits in use in 16-bit files, 8 to 16; 8-bit files do not need it.

    Raises:
      UserError: the file cannot be read, is not an image, is truncated, has more than
        `MAX_PIXELS` pixels, several frames, floats, 16-bit colour, or values above bit_depth.
    """
    with _bomb_warnings_off():
        result = _decode_or_reason(source, image_size, bit_depth)
    if isinstance(result, str):
        name = "image bytes" if isinstance(source, bytes) else source
        raise UserError(f"{name} cannot be read: {result}")
    return result.pixels


def decode_many(
    paths: Sequence[str | Path],
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
    total = len(paths)
    images = allocate_images((total, image_size, image_size, channels or 1))
    bad, deep, alpha, grey = [], [], 0, 0
    results = _decode_in_order(paths, image_size, bit_depth)
    with _bomb_warnings_off(), contextlib.closing(results):
        for index, result in enumerate(results):
            if progress and ((index + 1) % _BLOCK == 0 or index + 1 == total):
                progress(index + 1, total, "reading images")
            if isinstance(result, str):
                bad.append(f"{paths[index]} ({result})")
                continue
            if result.highest is not None:
                deep.append(result.highest)
            alpha += result.alpha
            grey += result.pixels.ndim == 2
            if channels is None and result.pixels.ndim == 3 and images.shape[-1] == 1:
                images = _widen(images, index)
            images[index] = _with_channels(result.pixels, images.shape[-1])
    if bad:
        raise UserError(
            f"{len(bad)} of {total} images cannot be read, first: {bad[0]}; replace or remove them"
        )
    if check_depth:
        _check_bit_depth(deep, bit_depth)
    coloured = channels is None and images.shape[-1] == 3
    return images, _notes(total, deep, alpha, grey if coloured else 0, bit_depth)


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
        stop = min(start + _BLOCK, total)
        for index in range(start, stop):
            pixels = images[index, ..., 0] if channels == 1 else images[index]
            picture = _resize(Image.fromarray(np.ascontiguousarray(pixels)), image_size)
            resized[index] = np.asarray(picture).reshape(resized.shape[1:])
        return stop

    for done in _in_order(resize_block, total):
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


def read_images_for_prediction(
    folder_or_file: str | Path,
    image_size: int,
    bit_depth: int = 16,
    channels: int | None = None,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(images, ids)`: uint8 `[n, s, s, c]` and str `[n]`, without labels.

    A folder is searched with all its sub-folders (dot files and dot folders left out) for
    files with an image suffix, sorted by relative path, which is the id. A file is read
    whatever its suffix; its name is the id.

    Args:
      folder_or_file: where to look.
      image_size: s.
      bit_depth: bits in use in 16-bit files: the one the model was trained with.
      channels: c = 1 (colour images become grey, ITU-R 601 luma), 3, or None as in the files.
      progress: called as `progress(done, total, text)`.

    Raises:
      UserError: no such path, no image in it, or images that cannot be read.
    """
    root = user_path(str(folder_or_file), "data.dir")
    if root.is_dir():
        found = sorted(_walk_images(root), key=lambda path: path.relative_to(root).as_posix())
        ids = [path.relative_to(root).as_posix() for path in found]
        if not found:
            raise UserError(f"no images ({' '.join(sorted(IMAGE_SUFFIXES))}) in {root}")
    elif root.is_file():
        found, ids = [root], [root.name]
    else:
        raise UserError(f"no such file or folder: {root}")
    images, _ = decode_many(
        found, image_size, bit_depth, channels=channels, check_depth=False, progress=progress
    )
    return images, np.array(ids, dtype=str)


def _walk_images(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); check its permission")

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES:
                yield path


def _decode_in_order(
    paths: list[str | Path], image_size: int, bit_depth: int
) -> Iterator[_Decoded | str]:
    # Plugins are registered before the threads start: registering is not thread-safe.
    Image.init()

    def decode_block(start: int) -> list[_Decoded | str]:
        block = paths[start : start + _BLOCK]
        return [_decode_or_reason(path, image_size, bit_depth) for path in block]

    for block in _in_order(decode_block, len(paths)):
        yield from block


def _in_order(work: Callable[[int], _Result], total: int) -> Iterator[_Result]:
    """Yields `work(start)` of each block of `_BLOCK` images, in order, from one thread a core."""
    with (
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        contextlib.closing(pool.map(work, range(0, total, _BLOCK))) as results,
    ):
        yield from results


def _decode_or_reason(
    source: str | Path | bytes, image_size: int, bit_depth: int
) -> _Decoded | str:
    """Returns the decoded image, or in a few words why there is none."""
    try:
        return _decode(source, image_size, bit_depth)
    except _UnreadableError as error:
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


def _decode(source: str | Path | bytes, image_size: int, bit_depth: int) -> _Decoded:
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as stream:
        if not stream.read(1):
            raise _UnreadableError("the file is empty")
        stream.seek(0)
        with Image.open(stream, formats=_FORMATS) as image:
            _check_header(image)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode in _DEEP_MODES:
                return _deep_to_grey(image, image_size, bit_depth)
            return _Decoded(_eight_bit(image, image_size), alpha=image.has_transparency_data)


def _check_header(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _UnreadableError(f"{width} x {height} is more than {MAX_PIXELS:,} pixels")
    # MPO is what phone cameras write as .jpg: the photograph, then its previews as frames.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise _UnreadableError(f"{image.n_frames} frames: save each frame as its own file")
    if image.mode == "F":
        raise _UnreadableError("floating-point pixels: save as 8- or 16-bit integers")
    if image.mode in _DEEP_MODES:
        # Pillow inverts 8-bit files of this kind, but not 16-bit ones.
        if image.format == "TIFF" and image.tag_v2.get(_TIFF_PHOTOMETRIC) == 0:
            raise _UnreadableError("16-bit TIFF with white as zero: save it with black as zero")
    elif any(";16" in str(tile.args) for tile in image.tile):
        # Pillow would keep the high byte alone, which is black for 12-bit data.
        raise _UnreadableError("16-bit colour or alpha: save as 8-bit colour or 16-bit grey")


def _eight_bit(image: Image.Image, image_size: int) -> np.ndarray:
    if image.mode in ("1", "L"):
        return np.asarray(_resize(image.convert("L"), image_size))
    if image.mode not in _COLOUR_MODES:
        raise _UnreadableError(f"pixels of Pillow mode {image.mode}: save as 8-bit grey or RGB")
    if image.mode in ("P", "PA", "La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode == "LA":
        return np.asarray(_resize(image.getchannel("L"), image_size))
    pixels = np.asarray(_resize(image.convert("RGB"), image_size))
    red = pixels[..., 0]
    if (red == pixels[..., 1]).all() and (red == pixels[..., 2]).all():
        return red
    return pixels


def _deep_to_grey(image: Image.Image, image_size: int, bit_depth: int) -> _Decoded:
    values = np.asarray(image)
    lowest, highest, limit = int(values.min()), int(values.max()), 2**bit_depth - 1
    if lowest < 0:
        raise _UnreadableError(f"negative value {lowest}: shift the values to start at 0")
    if highest > limit:
        raise _UnreadableError(
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
    return np.stack([_with_channels(image, 1) for image in images])


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    if pixels.ndim == 3 and channels == 1:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _widen(grey: np.ndarray, filled: int) -> np.ndarray:
    """Returns an RGB array with the first `filled` grey images repeated in three channels."""
    wide = allocate_images((*grey.shape[:-1], 3))
    wide[:filled] = grey[:filled]
    return wide


def _check_bit_depth(highest: list[int], bit_depth: int) -> None:
    if highest and bit_depth == 16 and max(highest) < 2**12:
        needed = 12 if max(highest) > 255 else 8
        raise UserError(
            f"the 16-bit images use only 0..{max(highest)} and would come out nearly black: "
            f"set data.bit_depth={needed}"
        )


def _notes(total: int, deep: list[int], alpha: int, grey: int, bit_depth: int) -> tuple[str, ...]:
    notes = []
    if deep:
        notes.append(
            f"{len(deep)} of {total} images are 16-bit: 0..{2**bit_depth - 1} "
            f"(data.bit_depth={bit_depth}) mapped to 0..255, highest value {max(deep)}"
        )
    if alpha:
        notes.append(f"{alpha} of {total} images have an alpha channel, which was dropped")
    if grey:
        notes.append(f"{grey} of {total} images are grey, repeated in three channels")
    return tuple(notes)


@contextlib.contextmanager
def _bomb_warnings_off() -> Iterator[None]:
    # Pillow warns from 89 million pixels on; MAX_PIXELS decides here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield
