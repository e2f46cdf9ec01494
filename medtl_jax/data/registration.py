"""Whether one image is the other, cropped: the crop that fits best, and how well it then fits.

The crop is found by Gauss-Newton steps on the squared difference, with contrast and brightness as
two further unknowns (Lucas and Kanade 1981; Evangelidis and Psarakis 2008), coarse to fine, and the
fit is the normalised cross-correlation of the fine structure. Two chests agree in their outlines,
not in that.
"""

import functools

import numpy as np
from scipy.ndimage import gaussian_filter1d

from medtl_jax.data.fingerprints import averages

# Sides of the images that are registered, coarse to fine, with the steps at each; and of those
# that are compared at last.
_PYRAMID = ((32, 6), (64, 3))
_COMPARED = 128
# Structures from the one to the other size, as standard deviations in parts of the side.
_COARSE_BAND = (1 / 64, 1 / 12)
_FINE_BAND = (1 / 128, 1 / 16)
# A little less than the whole, where a copy was moved, and more than is searched for.
_LEAST, _MOST, _STEP = -0.04, 0.2, 0.03
_BLOCK = 64
_DAMPING = 1e-5


def fit_crops(
    wholes: np.ndarray, parts: np.ndarray, crops: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(crops, fits)` of m pairs: float32 `[m, 4]` and `[m]`, 1 for equal structure.

    Args:
      wholes, parts: float32 grey `[m, s, s]`; each of `parts` may be a crop of its whole, which was
        resized to s pixels again.
      crops: float32 `[m, 4]`, where to start: parts cut off at the top, bottom, left and right.
    """
    found = [
        _fit_block(wholes[rows], parts[rows], crops[rows])
        for start in range(0, len(wholes), _BLOCK)
        for rows in [slice(start, start + _BLOCK)]
    ]
    return np.concatenate([crop for crop, _ in found]), np.concatenate([fit for _, fit in found])


def _fit_block(
    wholes: np.ndarray, parts: np.ndarray, crops: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    size = wholes.shape[1]
    for side, steps in _PYRAMID:
        if side > size and side != _PYRAMID[0][0]:
            break
        small = min(side, size)
        crops = _register(
            _band(_shrunk(wholes, small), _COARSE_BAND),
            _band(_shrunk(parts, small), _COARSE_BAND),
            crops,
            steps,
        )
    side = min(_COMPARED, size)
    seen = _cropped(_shrunk(wholes, side), crops)
    return crops, _correlation(_band(seen, _FINE_BAND), _band(_shrunk(parts, side), _FINE_BAND))


def _register(wholes: np.ndarray, parts: np.ndarray, crops: np.ndarray, steps: int) -> np.ndarray:
    """Returns the best of the crops that some steps lead through."""
    seen = _cropped(wholes, crops)
    best, highest = crops, _correlation(seen, parts)
    for _ in range(steps):
        crops = np.clip(crops + _change(seen, parts, crops), _LEAST, _MOST).astype(np.float32)
        seen = _cropped(wholes, crops)
        fit = _correlation(seen, parts)
        better = fit > highest
        best = np.where(better[:, None], crops, best)
        highest = np.where(better, fit, highest)
    return best


def _change(seen: np.ndarray, parts: np.ndarray, crops: np.ndarray) -> np.ndarray:
    """Returns `[m, 4]`: the step that makes `parts` most nearly a multiple of `seen`, plus a
    constant.
    """
    count, side = seen.shape[:2]
    near = ((np.arange(side) + 0.5) / side).astype(np.float32)
    far = 1 - near
    down, across = np.gradient(seen, axis=(1, 2))
    down *= (side / (1 - crops[:, 0] - crops[:, 1]))[:, None, None]
    across *= (side / (1 - crops[:, 2] - crops[:, 3]))[:, None, None]
    basis = np.stack(
        [
            seen,
            np.ones_like(seen),
            down * far[:, None],
            -down * near[:, None],
            across * far,
            -across * near,
        ],
        axis=1,
    ).reshape(count, 6, -1)
    products = basis @ basis.swapaxes(1, 2)
    weight = np.trace(products, axis1=1, axis2=2)[:, None, None] + 1e-12
    products += np.eye(6, dtype=np.float32) * (_DAMPING * weight)
    solved = np.linalg.solve(products, basis @ parts.reshape(count, -1, 1))[..., 0]
    gain = solved[:, :1]
    gain = np.where(np.abs(gain) < 0.1, 0.1, gain)
    return np.clip(solved[:, 2:] / gain, -_STEP, _STEP)


def _cropped(images: np.ndarray, crops: np.ndarray) -> np.ndarray:
    """Returns `[m, s, s]`: the images without their crops, at their own size (bilinear)."""
    side = images.shape[1]
    rows, columns = _lines(side, crops[:, 0], crops[:, 1]), _lines(side, crops[:, 2], crops[:, 3])
    return rows @ images @ columns.swapaxes(1, 2)


def _lines(side: int, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Returns float32 `[m, s, s]`: for each new pixel of a line its weights of the old ones."""
    places = (np.arange(side) + 0.5) * (1 - first - last)[:, None] + first[:, None] * side - 0.5
    places = np.clip(places, 0, side - 1)
    left = np.minimum(places.astype(np.int64), side - 2)
    share = (places - left).astype(np.float32)
    weights = np.zeros((len(first), side, side), np.float32)
    pair, line = np.arange(len(first))[:, None], np.arange(side)[None]
    weights[pair, line, left] = 1 - share
    weights[pair, line, left + 1] += share
    return weights


def _correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns float32 `[m]`: normalised cross-correlation, 0 where an image has one shade."""
    one, two = (part.reshape(len(part), -1) for part in (first, second))
    one = one - one.mean(axis=1, keepdims=True)
    two = two - two.mean(axis=1, keepdims=True)
    size = np.sqrt((one**2).sum(axis=1) * (two**2).sum(axis=1))
    return (one * two).sum(axis=1) / np.where(size > 1e-6, size, np.inf)


def _band(images: np.ndarray, band: tuple[float, float]) -> np.ndarray:
    side = images.shape[1]
    fine, coarse = (_blur(side, width * side) for width in band)
    return fine @ images @ fine.T - coarse @ images @ coarse.T


@functools.cache
def _blur(side: int, deviation: float) -> np.ndarray:
    """Returns float32 `[s, s]`: a Gaussian blur of a line of pixels."""
    return gaussian_filter1d(np.eye(side), deviation, axis=0, mode="nearest").astype(np.float32)


def _shrunk(images: np.ndarray, side: int) -> np.ndarray:
    """Returns the images at `side` pixels, means over their parts; as they are where equal."""
    if images.shape[1] == side:
        return images
    weights = averages(side, images.shape[1])
    return weights @ images @ weights.T
