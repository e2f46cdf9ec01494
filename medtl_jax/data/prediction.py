"""Images without labels, to be predicted: found in a folder or named one by one."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from medtl_jax.data.images import Progress, decode_many
from medtl_jax.data.masks import upright_sizes
from medtl_jax.data.medical import KINDS, Reading, check_channels, find_images, is_image
from medtl_jax.errors import UserError
from medtl_jax.files import user_path

_AS_THEY_ARE = Reading()


def read_images_for_prediction(
    folder_or_file: str | Path,
    image_size: int,
    bit_depth: int = 16,
    channels: int | None = None,
    progress: Progress | None = None,
    reading: Reading = _AS_THEY_ARE,
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Returns `(images, ids, notes)`: uint8 `[n, s, s, c]`, str `[n]`, and what was done.

    A folder is searched with all its sub-folders (dot files and dot folders left out) for
    image files, sorted by relative path, which is the id. A file is read whatever its suffix;
    its name is the id. The k-th frame of a DICOM file, or slice of a volume, adds `#k` where
    there are several.

    Args:
      folder_or_file: where to look.
      image_size: s.
      bit_depth: bits in use in 16-bit files: the one the model was trained with.
      channels: c = 1 (colour images become grey, ITU-R 601 luma), 3, or None as in the files.
      progress: called as `progress(done, total, text)`.
      reading: how DICOM and NIfTI files are read: as in the model's training.

    Raises:
      UserError: no such path, no image in it, or images that cannot be read.
    """
    root = user_path(str(folder_or_file), "data.dir")
    if root.is_dir():
        paths = sorted(_walk_images(root), key=lambda path: path.relative_to(root).as_posix())
        if not paths:
            raise UserError(f"no images ({KINDS}) in {root}")
        files = [(path, path.relative_to(root).as_posix()) for path in paths]
    elif root.is_file():
        files = [(root, root.name)]
    else:
        raise UserError(f"no such file or folder: {root}")
    check_channels(reading, grey=channels == 1)
    found = [image for images in find_images(files, reading, progress) for image in images]
    images, notes = decode_many(
        [image.source for image in found],
        image_size,
        bit_depth,
        channels=channels,
        check_depth=False,
        progress=progress,
    )
    return images, np.array([image.id for image in found], dtype=str), notes


def original_sizes(
    folder_or_file: str | Path, names: Sequence[str], reading: Reading = _AS_THEY_ARE
) -> list[tuple[int, int]]:
    """Returns width and height in pixels, upright, of the images of ids.

    Args:
      folder_or_file: where `read_images_for_prediction` found them.
      names: their ids.
      reading: as it was given there.

    Raises:
      UserError: a file cannot be read any more.
    """
    root = user_path(str(folder_or_file), "data.dir")
    inside = root.is_dir()
    files = [(root / name if inside else root.with_name(name), name) for name in names]
    alone = dataclasses.replace(reading, slices=1)  # neighbours have the size of their slice
    return upright_sizes([image.source for (image,) in find_images(files, alone)])


def _walk_images(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); check its permission")

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and is_image(path):
                yield path
