"""Copies of images: the same pixels, or the same picture mirrored, cropped, brightened, saved anew.

Every image of one split is compared with every one of another by their descriptions
(`fingerprints`), mirrored too, and each of them cropped in several ways against the other one
whole. The nearest few are then registered at a finer scale (`registration`), and what fits is a
copy.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from medtl_jax.data.catalog import Array
from medtl_jax.data.fingerprints import (
    MIRROR,
    WHOLE,
    Crop,
    Prints,
    Whitening,
    crops,
    describe,
    to_luma,
)
from medtl_jax.data.images import Progress
from medtl_jax.data.registration import fit_crops

LEAST_LIKENESS = 0.84
LEAST_FIT = 0.90
"""Of two images that are taken for copies of each other: see experiments/results/audit.md."""

MOST_PAIRS_CROPPED = 50_000_000
"""Of more pairs than these, cropped copies are not searched for."""

MOST_REGISTERED = 10_000
"""Pairs of two splits that are looked at closely, the most alike of them: digits have many more
than X-rays."""

_NEAREST = 3
_ROWS, _COLUMNS = 256, 2048
_READ = 64
_ENDS = tuple(itertools.product((0.0, 0.05, 0.1), repeat=2))
_EVEN = MIRROR > 0


@dataclasses.dataclass(frozen=True)
class Copy:
    """Two images that are copies, one of each of two splits (or both of one, of equal pixels).

    Attributes:
      first, second: their rows.
      fit: correlation of their fine structure, 1 for equal pixels.
      exact: whether the pixels are equal.
      mirrored: whether one is the other's mirror image.
      crop: parts cut off at the top, bottom, left and right of the one to make the other.
    """

    first: int
    second: int
    fit: float = 1.0
    exact: bool = True
    mirrored: bool = False
    crop: Crop = (0.0, 0.0, 0.0, 0.0)


def equal_pixels(first: Prints, second: Prints) -> list[Copy]:
    """Returns the pairs of equal pixels, with the first such row of `first` alone for each row of
    `second`; within one split (`second` is `first`) each with the first of its kind. Images of one
    shade are equal for nothing.
    """
    homes: dict[str, int] = {}
    for row in np.flatnonzero(~first.constant):
        homes.setdefault(first.keys[row], int(row))
    pairs = ((homes.get(second.keys[row]), int(row)) for row in np.flatnonzero(~second.constant))
    same = first is second
    return [Copy(a, b) for a, b in pairs if a is not None and not (same and a == b)]


# Of the many small products here BLAS's own threads would make each 20 times slower.
@threadpool_limits.wrap(limits=1, user_api="blas")
def near_copies(
    first: tuple[Array, Prints],
    second: tuple[Array, Prints],
    whitening: Whitening,
    progress: Progress | None = None,
) -> tuple[list[Copy], int]:
    """Returns the copies among the images of two splits whose pixels are not equal, and how many
    pairs that look alike were not looked at closely.

    Of each image of `second` the few of `first` that are nearest are, and of all these pairs the
    `MOST_REGISTERED` that are most alike. Cropped copies are searched for where there are no more
    than `MOST_PAIRS_CROPPED` pairs.

    Args:
      first, second: the images, uint8 `[n, s, s, c]`, of equal s, in memory or streamed, and their
        prints.
      whitening: of the whole set.
      progress: called as `progress(done, total, text)`.
    """
    thumbnails = tuple(prints.thumbnails for _, prints in (first, second))
    ends = _ENDS if searches_crops(*map(len, thumbnails)) else WHOLE
    rows, columns = _candidates(*thumbnails, whitening, ends, progress)
    left = max(len(rows) - MOST_REGISTERED, 0)
    rows, columns = rows[:MOST_REGISTERED], columns[:MOST_REGISTERED]
    differ = first[1].keys[columns] != second[1].keys[rows]
    plain = first[1].constant[columns] | second[1].constant[rows]
    rows, columns = rows[differ & ~plain], columns[differ & ~plain]
    if not len(rows):
        return [], left
    starts = _best_starts(thumbnails[0][columns], thumbnails[1][rows], whitening, ends)
    return _confirmed(first[0], second[0], columns, rows, *starts), left


def searches_crops(first: int, second: int) -> bool:
    """Returns whether cropped copies are searched for among so many images of two splits."""
    return first * second <= MOST_PAIRS_CROPPED


def _candidates(
    first: np.ndarray,
    second: np.ndarray,
    whitening: Whitening,
    ends: Sequence[tuple[float, float]],
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of `second` and of `first`: pairs that are alike enough, the nearest few.

    The most alike are first.
    """
    found, done, total = [], 0, -(-len(first) // _COLUMNS) * -(-len(second) // _ROWS)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for column in range(0, len(first), _COLUMNS):
            described = whitening.apply(describe(first[column : column + _COLUMNS], ends))

            def nearest(row: int, one=described) -> tuple[np.ndarray, ...]:
                two = whitening.apply(describe(second[row : row + _ROWS], ends))
                return _nearest(_likeness(one, two))

            rows = range(0, len(second), _ROWS)
            for row, (near, places, alike) in zip(rows, pool.map(nearest, rows), strict=True):
                found.append((near + row, places + column, alike))
                done += 1
                if progress:
                    progress(done, total, "comparing images")
    rows, columns, alike = (np.concatenate(part) for part in zip(*found, strict=True))
    # Of each row the few greatest over all blocks of columns.
    order = np.lexsort((-alike, rows))
    firsts = np.searchsorted(rows[order], rows[order])
    order = order[np.arange(len(order)) - firsts < _NEAREST]
    order = order[np.argsort(-alike[order], kind="stable")]
    return rows[order], columns[order]


def _nearest(likeness: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns rows, columns and values of the few greatest of each row that are great enough."""
    kept = min(_NEAREST, likeness.shape[1])
    places = np.argpartition(-likeness, kept - 1, axis=1)[:, :kept]
    values = np.take_along_axis(likeness, places, axis=1)
    rows, chosen = np.nonzero(values >= LEAST_LIKENESS)
    return rows, places[rows, chosen], values[rows, chosen]


def _likeness(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns float32 `[n2, n1]`: of each pair the likeness of the crop that makes it greatest.

    Args:
      first, second: float32 `[k, n1, d]` and `[k, n2, d]`, whitened descriptions of k crops, of
        which the first is the whole image.
    """
    likeness = np.full((second.shape[1], first.shape[1]), -1, np.float32)
    pairs = [(first[0], part) for part in second] + [(part, second[0]) for part in first[1:]]
    for one, two in pairs:
        # Mirrored, the odd part changes its sign: the better of both has it positive.
        alike = two[:, ~_EVEN] @ one[:, ~_EVEN].T
        np.abs(alike, out=alike)
        alike += two[:, _EVEN] @ one[:, _EVEN].T
        np.maximum(likeness, alike, out=likeness)
    return likeness


def _best_starts(
    first: np.ndarray,
    second: np.ndarray,
    whitening: Whitening,
    ends: Sequence[tuple[float, float]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns of m pairs the crop `[m, 4]`, whether it is of `first`, and whether one is mirrored,
    that make them most alike.
    """
    one, two = (whitening.apply(describe(part, ends)) for part in (first, second))
    scores = [
        np.einsum("knd,nd->kn", part, whole[0] * sign)
        for part, whole in ((one, two), (two, one))
        for sign in (np.ones_like(MIRROR), MIRROR)
    ]
    best = np.argmax(np.concatenate(scores), axis=0)
    way, crop = np.divmod(best, len(one))
    cuts = np.array(crops(ends), np.float32)[crop]
    of_first, mirrored = way < 2, way % 2 == 1
    # A crop of `second` is said of its mirror image, which is what is registered.
    turned = mirrored & ~of_first
    cuts[turned] = cuts[turned][:, [0, 1, 3, 2]]
    return cuts, of_first, mirrored


def _confirmed(
    first: Array,
    second: Array,
    columns: np.ndarray,
    rows: np.ndarray,
    cuts: np.ndarray,
    of_first: np.ndarray,
    mirrored: np.ndarray,
) -> list[Copy]:
    """Returns the pairs that fit once they are registered; a few images are read at a time."""
    confirm = functools.partial(_confirmed_block, first, second)
    arrays = (columns, rows, cuts, of_first, mirrored)
    starts = range(0, len(rows), _READ)
    parts = ([array[start : start + _READ] for array in arrays] for start in starts)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [copy for copies in pool.map(confirm, *zip(*parts, strict=True)) for copy in copies]


def _confirmed_block(
    first: Array,
    second: Array,
    columns: np.ndarray,
    rows: np.ndarray,
    cuts: np.ndarray,
    of_first: np.ndarray,
    mirrored: np.ndarray,
) -> list[Copy]:
    one, two = to_luma(first[columns]), to_luma(second[rows])
    two = np.where(mirrored[:, None, None], two[:, :, ::-1], two)
    cut = of_first[:, None, None]
    found, fits = fit_crops(np.where(cut, one, two), np.where(cut, two, one), cuts)
    return [
        Copy(
            int(columns[k]),
            int(rows[k]),
            round(float(fits[k]), 4),
            exact=False,
            mirrored=bool(mirrored[k]),
            crop=tuple(round(float(max(value, 0)), 4) for value in found[k]),
        )
        for k in np.flatnonzero(fits >= LEAST_FIT)
    ]
