"""Mask files as arrays of the class of each pixel: decoding, checks of size and values."""

import contextlib
from collections.abc import Callable, Collection, Sequence

import numpy as np
from PIL import Image, ImageOps

from medtl_jax.data.imagefile import (
    DEEP_MODES,
    UnreadableError,
    decoder_warnings_off,
    open_checked,
)
from medtl_jax.data.images import (
    BLOCK,
    Progress,
    allocate_images,
    attempt,
    in_order,
)
from medtl_jax.data.planes import ImageSource, Plane, upright_size_of
from medtl_jax.errors import UserError

MAX_CLASSES = 256

# Pillow spreads the grey values of 2- and 4-bit PNG files over 0..255.
_SPREAD = {"L;2": 85, "L;4": 17}
_SHOWN = 6
# Pixels counted together: NumPy makes eight bytes of each.
_COUNTED = 2**20


def decode_mask(
    source: ImageSource | bytes,
    image_size: int,
    num_classes: int,
    expected_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Returns the class of each pixel of one mask file, uint8 `[s, s]`.

    The pixels' values are the classes: grey values, whatever the bits a pixel, or the indices of
    a palette. With two classes, a mask of 0 and 255 (or of one bit) means classes 0 and 1. A
    colour file must have equal channels; alpha is dropped. The mask is turned upright (EXIF) as
    its image is, and resized by the nearest neighbour, which invents no class.

    Args:
      source: a file in one of the formats of `images.decode_image`, or its bytes.
      image_size: s, height and width of the result in pixels.
      num_classes: k, 2 to 256.
      expected_size: width and height of the upright image; None does not compare.

    Raises:
      UserError: the file cannot be read, has another size than its image, or has values that
        are no classes.
    """
    with decoder_warnings_off():
        return decode_mask_in_thread(source, image_size, num_classes, expected_size)


def decode_mask_in_thread(
    source: ImageSource | bytes,
    image_size: int,
    num_classes: int,
    expected_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Returns what `decode_mask` does, from any thread (see `images.decode_in_thread`)."""
    result = _decode_or_reason(source, image_size, num_classes, expected_size)
    if isinstance(result, str):
        name = "mask bytes" if isinstance(source, bytes) else source
        raise UserError(f"{name} cannot be used as a mask: {result}")
    return result


def decode_masks(
    paths: Sequence[ImageSource],
    image_size: int,
    num_classes: int,
    expected_sizes: Sequence[tuple[int, int]] | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Returns uint8 `[n, s, s]`: `decode_mask` of each path, in their order, on all cores.

    Raises:
      UserError: some masks cannot be used: how many, and why the first.
    """
    masks = allocate_images((len(paths), image_size, image_size, 1))[..., 0]
    _visit(paths, image_size, num_classes, expected_sizes, progress, masks.__setitem__)
    return masks


def check_masks(
    paths: Sequence[ImageSource],
    image_size: int,
    num_classes: int,
    expected_sizes: Sequence[tuple[int, int]] | None = None,
    progress: Progress | None = None,
) -> None:
    """Raises the UserError that `decode_masks` would raise, and keeps no mask."""
    _visit(paths, image_size, num_classes, expected_sizes, progress, lambda row, mask: None)


def _visit(
    paths: Sequence[ImageSource],
    image_size: int,
    num_classes: int,
    expected_sizes: Sequence[tuple[int, int]] | None,
    progress: Progress | None,
    use: Callable[[int, np.ndarray], None],
) -> None:
    """Calls `use(row, mask)` for each mask from several threads; UserError for unusable ones."""
    total, bad = len(paths), {}

    def decode_block(start: int) -> int:
        stop = min(start + BLOCK, total)
        for row in range(start, stop):
            size = None if expected_sizes is None else expected_sizes[row]
            result = _decode_or_reason(paths[row], image_size, num_classes, size)
            if isinstance(result, str):
                bad[row] = result
            else:
                use(row, result)
        return stop

    with decoder_warnings_off(), contextlib.closing(in_order(decode_block, total)) as blocks:
        for done in blocks:
            if progress:
                progress(done, total, "reading masks")
    refuse_bad(paths, bad)


def upright_sizes(paths: Sequence[ImageSource]) -> list[tuple[int, int]]:
    """Returns width and height in pixels of each image, turned upright, by the files' headers.

    Raises:
      UserError: some files cannot be read.
    """
    sizes, bad = {}, {}

    def read_block(start: int) -> None:
        for row in range(start, min(start + BLOCK, len(paths))):
            result = _size_or_reason(paths[row])
            (bad if isinstance(result, str) else sizes)[row] = result

    with decoder_warnings_off(), contextlib.closing(in_order(read_block, len(paths))) as blocks:
        for _ in blocks:
            pass
    refuse_bad(paths, bad, "images", "read")
    return [sizes[row] for row in range(len(paths))]


def resize_masks(masks: np.ndarray, image_size: int) -> np.ndarray:
    """Returns uint8 `[n, s, s]` of the masks uint8 `[n, h, w]`: nearest neighbour, as for files."""
    if masks.shape[1:] == (image_size, image_size):
        return masks
    return np.stack([_resize(mask, image_size) for mask in masks])


def resize_note(sizes: Collection[tuple[int, int]], image_size: int) -> tuple[str, ...]:
    """Returns a note where masks of these widths and heights in pixels are resized, else none."""
    if set(sizes) <= {(image_size, image_size)}:
        return ()
    (width, height), several = min(sizes), len(set(sizes)) > 1
    found = "several sizes" if several else f"{width} x {height} pixels (width x height)"
    return (
        f"masks of {found} are resized to {image_size} x {image_size} by the nearest neighbour; "
        f"all scores are at {image_size} x {image_size}",
    )


def refuse_bad(
    paths: Sequence[ImageSource], bad: dict[int, str], kind: str = "masks", verb: str = "used"
) -> None:
    """Raises UserError where `bad`, the reason at each row of `paths`, has any."""
    if bad:
        first = min(bad)
        raise UserError(
            f"{len(bad)} of {len(paths)} {kind} cannot be {verb}, first: {paths[first]} "
            f"({bad[first]}); replace or remove them"
        )


def _decode_or_reason(
    source: ImageSource | bytes,
    image_size: int,
    num_classes: int,
    expected_size: tuple[int, int] | None,
) -> np.ndarray | str:
    return attempt(lambda: _decode(source, image_size, num_classes, expected_size))


def _size_or_reason(source: ImageSource) -> tuple[int, int] | str:
    return attempt(lambda: upright_size_of(source))


def _decode(
    source: ImageSource | bytes,
    image_size: int,
    num_classes: int,
    expected_size: tuple[int, int] | None,
) -> np.ndarray:
    if isinstance(source, Plane):
        _check_size(source.size, expected_size)
        return _resize(to_classes(source.labels(), num_classes), image_size)
    with open_checked(source) as image:
        spread = next((_SPREAD[args] for args in _raw_modes(image) if args in _SPREAD), 1)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        _check_size(image.size, expected_size)
        values = _values(image) if spread == 1 else _values(image) // spread
    return _resize(to_classes(values, num_classes), image_size)


def _check_size(size: tuple[int, int], expected: tuple[int, int] | None) -> None:
    """Raises UnreadableError where a mask has another width and height than its image."""
    if expected is not None and size != tuple(expected):
        raise UnreadableError(
            f"the mask is {size[0]} x {size[1]} pixels and its image {expected[0]} x {expected[1]}"
        )


def _resize(classes: np.ndarray, image_size: int) -> np.ndarray:
    size = (image_size, image_size)
    return np.asarray(Image.fromarray(classes).resize(size, Image.Resampling.NEAREST))


def _raw_modes(image: Image.Image) -> list[str]:
    """Returns how the file stores a pixel, for each tile of it."""
    modes = [
        tile.args if isinstance(tile.args, str) else (tile.args or ("",))[0] for tile in image.tile
    ]
    return [str(mode) for mode in modes]


def _values(image: Image.Image) -> np.ndarray:
    """Returns the integers `[h, w]` that a mask file stores."""
    if image.mode in {"1", "L", "P"} or image.mode in DEEP_MODES:
        return np.asarray(image.convert("L") if image.mode == "1" else image)
    if image.mode in {"LA", "La", "PA"}:
        return np.asarray(image.getchannel(0))
    if image.mode not in {"RGB", "RGBX", "RGBA", "RGBa"}:
        raise UnreadableError(f"pixels of Pillow mode {image.mode}: save the mask as 8-bit grey")
    channels = np.asarray(image)[..., :3]
    if (channels != channels[..., :1]).any():
        raise UnreadableError("a coloured mask: save it as 8-bit grey, the value being the class")
    return channels[..., 0]


def different_values(values: np.ndarray) -> np.ndarray:
    """Returns the sorted different integers of masks, in little memory beside theirs."""
    flat = values.reshape(-1)
    blocks = (flat[start : start + _COUNTED] for start in range(0, len(flat), _COUNTED))
    if values.dtype != np.uint8:
        return np.unique(np.concatenate([np.unique(block) for block in blocks]))
    # Counting bytes is many times faster than sorting them.
    found = np.zeros(256, bool)
    for block in blocks:
        found |= np.bincount(block, minlength=256) > 0
    return np.flatnonzero(found)


def to_classes(values: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the classes, uint8, of the integers that masks store, one mask or several together.

    Raises:
      UnreadableError: values that are no classes.
    """
    if num_classes > MAX_CLASSES:
        raise UnreadableError(f"{num_classes} classes are more than a byte can tell apart")
    found = different_values(values)
    if num_classes == 2 and np.isin(found, (0, 255)).all():
        return (values > 0).astype(np.uint8)
    if found[0] < 0 or found[-1] >= num_classes:
        shown = ", ".join(map(str, found[:_SHOWN].tolist())) + (", ..." * (len(found) > _SHOWN))
        both = " or 0 and 255" if num_classes == 2 else ""
        raise UnreadableError(
            f"its values are {shown}: {num_classes} classes need 0 to {num_classes - 1}{both}"
        )
    return values.astype(np.uint8)
