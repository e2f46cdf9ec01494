"""Distances between the outlines of two masks, in pixels.

The outline of a mask is its pixels with one of their four neighbours outside it; beyond the image
is outside.

- **HD95**: the larger of the two directed 95th percentiles (linear interpolation) of the distances
  from each outline's pixels to the nearest pixel of the other, as MONAI and surface-distance
  compute it. medpy pools both directions before the percentile, which hides a small false island.
- **NSD**, normalised surface distance (Nikolov et al. 2018, surface Dice): the part of both
  outlines' pixels that lie within a tolerance of the other outline.

Without the object in both masks neither is defined. With it in one alone no distance exists
either, but leaving the image out would reward a network for missing an object altogether, and the
infinite distance of MONAI and surface-distance would take the mean with it: HD95 is then the
diagonal of the image, the largest distance there is (the convention of the BraTS challenges),
and NSD is 0.
"""

import math

import numpy as np
from scipy import ndimage


def surface_scores(truth: np.ndarray, called: np.ndarray, tolerance: float) -> tuple[float, float]:
    """Returns `(HD95 in pixels, NSD in 0..1)` of two masks, bool `[h, w]`; NaN if both are empty.

    Args:
      truth: mask of the observer.
      called: mask of the network.
      tolerance: of NSD, in pixels; a distance equal to it is within.
    """
    either = truth | called
    if not either.any():
        return math.nan, math.nan
    if not truth.any() or not called.any():
        return math.hypot(truth.shape[0] - 1, truth.shape[1] - 1), 0.0
    box = tuple(slice(places.min(), places.max() + 1) for places in np.nonzero(either))
    first, second = _outline(truth[box]), _outline(called[box])
    to_second = ndimage.distance_transform_edt(~second)[first]
    to_first = ndimage.distance_transform_edt(~first)[second]
    within = (to_second <= tolerance).sum() + (to_first <= tolerance).sum()
    hd95 = max(np.percentile(to_second, 95), np.percentile(to_first, 95))
    return float(hd95), float(within / (len(to_second) + len(to_first)))


def _outline(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask)
