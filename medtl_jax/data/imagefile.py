"""One image file, opened: its header read and checked, its pixels not yet decoded."""

import contextlib
import io
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from PIL import Image

MAX_PIXELS = 100_000_000
# Pillow's names for grey pixels of more than 8 bits.
DEEP_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I"})

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF")
_TIFF_PHOTOMETRIC = 262
# EXIF's tag of the orientation, and its values that swap width and height.
_ORIENTATION = 0x0112
_SIDEWAYS = frozenset({5, 6, 7, 8})


class Opener(Protocol):
    """What can be opened like a path; `str()` of it is its name in messages."""

    def open(self, mode: str) -> BinaryIO:
        """A stream of the encoded image, seekable; `mode` is "rb"."""


Source = str | Path | Opener


class UnreadableError(Exception):
    """Why one file cannot be used, without its name."""


@contextlib.contextmanager
def open_checked(source: Source | bytes) -> Iterator[Image.Image]:
    """Yields the image, its header read and checked and its pixels not loaded.

    Raises:
      UnreadableError, or what Pillow raises (see `images.attempt`): it cannot be used.
    """
    with open_source(source) as stream:
        if not stream.read(1):
            raise UnreadableError("the file is empty")
        stream.seek(0)
        with Image.open(stream, formats=_FORMATS) as image:
            _check_header(image)
            yield image


def upright_size(source: Source | bytes) -> tuple[int, int]:
    """Returns width and height in pixels of the image, turned upright, by its header.

    Raises:
      UnreadableError, or what Pillow raises: as `open_checked`.
    """
    with open_checked(source) as image:
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION) in _SIDEWAYS
        return (height, width) if turned else (width, height)


def _check_header(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableError(f"{width} x {height} is more than {MAX_PIXELS:,} pixels")
    # MPO is what phone cameras write as .jpg: the photograph, then its previews as frames.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise UnreadableError(f"{image.n_frames} frames: save each frame as its own file")
    if image.mode == "F":
        raise UnreadableError("floating-point pixels: save as 8- or 16-bit integers")
    if image.mode in DEEP_MODES:
        # Pillow inverts 8-bit files of this kind, but not 16-bit ones.
        if image.format == "TIFF" and image.tag_v2.get(_TIFF_PHOTOMETRIC) == 0:
            raise UnreadableError("16-bit TIFF with white as zero: save it with black as zero")
    elif any(";16" in str(tile.args) for tile in image.tile):
        # Pillow would keep the high byte alone, which is black for 12-bit data.
        raise UnreadableError("16-bit colour or alpha: save as 8-bit colour or 16-bit grey")


def open_source(source: Source | bytes) -> BinaryIO:
    """Returns a binary stream of an image file's bytes, to be closed by the caller.

    Raises:
      UnreadableError: a folder, or a device or pipe, which might never end.
      OSError: the file cannot be opened.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str):
        source = Path(source)
    if isinstance(source, Path) and not stat.S_ISREG(mode := source.stat().st_mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise UnreadableError(f"it is {what}: name an image file")
    return source.open("rb")


@contextlib.contextmanager
def decoder_warnings_off() -> Iterator[None]:
    """Silences Pillow's warning about large images, and pydicom's remarks, in every thread."""
    with warnings.catch_warnings():
        # Pillow warns from 89 million pixels on; MAX_PIXELS decides here.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        # On values that the standard does not allow, some of which its messages quote. What
        # cannot be read is an error all the same.
        warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
        yield
