"""Boxes of one draw: around what a warped coordinate grid, and a moved mask, say of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_geometry import FULL, SQUARE, WHOLE_PIXELS, draws, rigid, sources

from medtl_jax.augment import geometry
from medtl_jax.augment.geometry import Geometry

move_boxes = jax.jit(geometry.move_boxes, static_argnums=2)


@pytest.mark.parametrize(
    ("settings", "slack"),
    [(WHOLE_PIXELS, 0.0), (FULL, 1.0), (Geometry(elastic=0.06), 1.0)],
    ids=["whole pixels", "full", "elastic"],
)
def test_boxes_move_as_a_warped_coordinate_grid_says(settings, slack):
    """Around the pixels whose source lies within the box; by a pixel at most on each side."""
    size = (64, 64)
    boxes = np.array([[20, 12, 41, 50], [30, 30, 37, 36], [3, 40, 33, 60]], np.float32)
    placements, found = sources(size, settings, 16)
    moved = jax.jit(jax.vmap(lambda placement: geometry.move_boxes(placement, boxes, size)))
    for source, new in zip(found, np.asarray(moved(placements)), strict=True):
        # Away from the image's border, where the edge is repeated and a source says little.
        inner = ((source > 0) & (source < 63)).all(-1) if slack else np.ones(size, bool)
        for box, (top, left, bottom, right) in zip(boxes, new, strict=True):
            inside = ((source + 0.5 > box[:2]) & (source + 0.5 < box[2:])).all(-1) & inner
            rows, columns = np.nonzero(inside)
            assert top <= rows.min() + 0.5 + slack / 8 and left <= columns.min() + 0.5 + slack / 8
            assert bottom >= rows.max() + 0.5 - slack / 8
            assert right >= columns.max() + 0.5 - slack / 8
            if min(top, left) > 0 and max(bottom, right) < 64:
                edges = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
                np.testing.assert_allclose([top, left, bottom, right], edges, atol=slack)


def test_boxes_by_hand():
    boxes = jnp.array([[2.0, 1.0, 5.0, 4.0], [0.0, 0.0, 8.0, 10.0]])
    mirrored = move_boxes(rigid([(1, 0, 0), (0, -1, 0)]), boxes, (8, 10))
    np.testing.assert_array_equal(mirrored, [[2, 6, 5, 9], [0, 0, 8, 10]])
    # A magnification by two about the centre (4, 5), clipped to the image.
    larger = move_boxes(rigid([(0.5, 0, 0), (0, 0.5, 0)]), boxes, (8, 10))
    np.testing.assert_allclose(larger, [[0, 0, 6, 3], [0, 0, 8, 10]], atol=1e-5)
    # Three pixels down: row r of the result is row r - 3 of the source.
    lower = move_boxes(rigid([(1, 0, -3), (0, 1, 0)]), boxes, (8, 10))
    np.testing.assert_array_equal(lower, [[5, 1, 8, 4], [0, 0, 8, 10]])


def test_a_box_at_the_border_goes_on_with_the_edge_by_hand():
    """Three pixels down and two to the right: the first row and column are repeated."""
    down_and_right = rigid([(1, 0, -3), (0, 1, -2)], whole_pixels=True)
    boxes = jnp.array(
        [[0, 4, 2, 6], [3, 0, 5, 1], [0, 0, 2, 2], [1, 1, 2, 2], [6, 3, 8, 10]], jnp.float32
    )
    expected = [[0, 6, 5, 8], [6, 0, 8, 3], [0, 0, 5, 4], [4, 3, 5, 4], [0, 0, 0, 0]]
    np.testing.assert_array_equal(move_boxes(down_and_right, boxes, (8, 10)), expected)
    # Out by a factor of two: three rows and columns are repeated on every side of the 12 pixels.
    out = rigid([(2, 0, 0), (0, 2, 0)])
    boxes = jnp.array([[0, 4, 6, 8], [4, 6, 12, 12], [4, 4, 8, 8]], jnp.float32)
    expected = [[0, 5, 6, 7], [5, 6, 12, 12], [5, 5, 7, 7]]
    np.testing.assert_allclose(move_boxes(out, boxes, (12, 12)), expected, atol=1e-5)


AT_THE_BORDER = ((0, 9, 7, 17), (13, 0, 20, 8), (0, 0, 6, 9), (12, 18, 24, 24), (0, 8, 24, 15))


@pytest.mark.parametrize(
    ("settings", "least", "most"),
    [
        (WHOLE_PIXELS, 0.0, 0.0),
        (Geometry(scale=0.4, shift=0.2), 0.5, 1.0),
        (FULL, 0.5, None),
    ],
    ids=["whole pixels", "zoom", "full"],
)
def test_the_box_of_an_object_at_the_border_is_that_of_its_mask(settings, least, most):
    """The box has all pixels of the mask, and no others where both are rectangles."""
    count = 24
    placements = draws(count, SQUARE, settings)
    move_masks = jax.jit(jax.vmap(geometry.move_mask, (0, None)))
    boxes = np.array(AT_THE_BORDER, np.float32)
    moved = np.asarray(jax.vmap(lambda one: move_boxes(one, boxes, SQUARE))(placements))
    compared = 0
    for number, (top, left, bottom, right) in enumerate(AT_THE_BORDER):
        mask = np.zeros(SQUARE, np.uint8)
        mask[top:bottom, left:right] = 1
        for new, box in zip(
            np.asarray(move_masks(placements, mask)), moved[:, number], strict=True
        ):
            rows, columns = np.nonzero(new)
            if not rows.size:
                continue
            wanted = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
            # By which each side of the box lies outside of the mask's.
            outside = (np.array(wanted) - box) * [1, 1, -1, -1]
            assert outside.min() >= -least, (wanted, box)
            assert most is None or outside.max() <= most, (wanted, box)
            compared += 1
    assert compared > 0.9 * count * len(AT_THE_BORDER)


def test_boxes_that_leave_the_image_and_padding_come_back_empty():
    boxes = jnp.array([[0.0, 1.0, 2.0, 4.0], [0.0, 0.0, 0.0, 0.0], [3.0, 3.0, 6.0, 3.0]])
    angle = math.radians(30)
    turn = rigid([(math.cos(angle), -math.sin(angle), 4), (math.sin(angle), math.cos(angle), 0)])
    found = move_boxes(rigid([(1, 0, 5), (0, 1, 0)]), boxes, (8, 8))
    np.testing.assert_array_equal(found, np.zeros((3, 4)))
    np.testing.assert_array_equal(move_boxes(turn, boxes, (8, 8))[1:], np.zeros((2, 4)))
