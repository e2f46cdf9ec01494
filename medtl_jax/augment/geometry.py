"""Geometric augmentation: one draw for an image, its mask and its boxes, and one resampling.

`draw` makes a `Placement` from a key; `move_image`, `move_mask` and `move_boxes` apply it. All are
pure functions of one example, to be called under `jax.vmap` and `jax.jit`.

Coordinates are (row, column) in pixels. The map is a backward one: it says for each pixel of the
result where in the source it comes from. Going from the result to the source, a point passes the
elastic displacement, then one affine map made of rotation, shear, scale, crop, quarter turns,
shift and flips, so that the image itself is read once. Beyond the image its edge is repeated, and
with it what lies there: of an object at the border, mask and box go on to where the edge does.
"""

import dataclasses
import functools
import math
from types import MappingProxyType

import flax.struct
import jax
import jax.numpy as jnp

from medtl_jax.errors import UserError
from medtl_jax.keys import named_key

Strength = float | jax.Array

# Cells of the elastic control grid along each side, and the control points that cubic B-splines
# over so many cells need.
_CELLS = 4
_CONTROLS = _CELLS + 3

# A box's edge is followed through an elastic displacement at so many points.
_EDGE_POINTS = 8

# A box around nothing: it leaves another as it is where the two are joined.
_NOTHING = (math.inf, math.inf, -math.inf, -math.inf)

# In 20 steps the inverse of the strongest elastic displacement is within 0.72**20 * 0.06 = 1e-4
# of the side (see `_displacement`), that of a usual one within float precision.
_INVERSE_STEPS = 20

# Largest strengths. Beyond them an image would be gone (scale, crop), mirrored (shear) or folded
# (elastic).
LIMITS = MappingProxyType(
    {
        "flip_horizontal": 1.0,
        "flip_vertical": 1.0,
        "quarter_turns": 1.0,
        "shift": 1.0,
        "rotate": 180.0,
        "scale": 0.9,
        "shear": 40.0,
        "crop": 0.95,
        "elastic": 0.06,
    }
)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How strong each geometric transform may be; 0 leaves it out of the program.

    A strength may be a traced scalar too (one drawn for each image): such a transform is always
    part of the program, and its limit is the caller's to keep. UserError if a number is outside
    0..`LIMITS`.
    """

    flip_horizontal: Strength = 0.0  # probability of a left-right mirror image
    flip_vertical: Strength = 0.0  # probability of an upside-down mirror image
    quarter_turns: Strength = 0.0  # probability of one of the three turns; square images only
    shift: Strength = 0.0  # by whole pixels, at most this fraction of each side
    rotate: Strength = 0.0  # about the centre, at most so many degrees either way
    scale: Strength = 0.0  # about the centre, by a factor from 1 +- this
    shear: Strength = 0.0  # along each axis, at most so many degrees either way
    crop: Strength = 0.0  # at most this part of the area is cut away, the aspect ratio kept
    elastic: Strength = 0.0  # smooth displacement, at most this fraction of each side

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            strength = getattr(self, name)
            if not isinstance(strength, jax.Array) and not 0 <= strength <= limit:
                raise UserError(f"augment.{name}={strength} must lie in 0..{limit:g}")

    def uses(self, *names: str) -> bool:
        """Whether any of the named transforms is part of the program."""
        strengths = (getattr(self, name) for name in names)
        return any(isinstance(strength, jax.Array) or strength > 0 for strength in strengths)


@flax.struct.dataclass
class Placement:
    """One example's draw: a backward map from the pixels of the result to those of the source."""

    # [3, 3] float32, homogeneous, of (row, column) about the image's centre; None = stays in place.
    matrix: jax.Array | None
    # [2, 7, 7] float32, displacements of the elastic grid in fractions of the side; None = rigid.
    controls: jax.Array | None
    # Whether every pixel of the result is a pixel of the source, so that nothing is interpolated.
    whole_pixels: bool = flax.struct.field(pytree_node=False)


def draw(key: jax.Array, size: tuple[int, int], geometry: Geometry) -> Placement:
    """The placement of one example of `size` (height, width).

    It depends on the key, the size and the strengths alone: each transform draws from its own
    named fold of `key`. UserError for quarter turns of an image that is not square.
    """
    if geometry.uses("quarter_turns") and size[0] != size[1]:
        raise UserError(
            f"augment.quarter_turns needs square images, not {size[0]} x {size[1]}; set it to 0"
        )
    # The order in which a point passes them on its way from the result to the source.
    steps = {
        "rotate": _rotate,
        "shear": _shear,
        "scale": _scale,
        "crop": functools.partial(_crop, size=size),
        "quarter_turns": _quarter_turns,
        "shift": functools.partial(_shift, size=size),
        "flip_vertical": functools.partial(_flip, axis=0),
        "flip_horizontal": functools.partial(_flip, axis=1),
    }
    matrix = None
    for name, step in steps.items():
        if geometry.uses(name):
            new = step(named_key(key, name), getattr(geometry, name))
            matrix = new if matrix is None else _product(new, matrix)
    controls = None
    if geometry.uses("elastic"):
        # The same numbers as of the full shape, in a fifth of the time to compile.
        drawn = _either_way(named_key(key, "elastic"), (2 * _CONTROLS**2,))
        controls = geometry.elastic * drawn.reshape(2, _CONTROLS, _CONTROLS)
        matrix = jnp.eye(3) if matrix is None else matrix
    interpolated = geometry.uses("rotate", "shear", "scale", "crop", "elastic")
    return Placement(matrix, controls, whole_pixels=not interpolated)


def move_image(placement: Placement, image: jax.Array) -> jax.Array:
    """The moved image `[h, w, c]`, float32 as it came; bilinear, its edges repeated."""
    if placement.matrix is None:
        return image
    if placement.whole_pixels:
        return _nearest(placement, image)
    height = image.shape[0]
    source = _source_pixels(placement, image.shape[:2])
    half = (height + 1) // 2

    def fill(index, moved):
        # Of an odd height, the second half starts a row early: a slice never leaves its array.
        part = (jax.lax.dynamic_slice_in_dim(axis, index * half, half) for axis in source)
        new = _bilinear(image, *part)
        return jax.lax.dynamic_update_slice_in_dim(moved, new, index * half, axis=0)

    # XLA would fuse the reads with what follows and, on a CPU, read all again for each use of the
    # image (with a contrast behind, at 224 pixels in colour: 105 ms for 32 images, not 34). Into
    # a loop it does not fuse; two turns are the fewest that stay one.
    return jax.lax.fori_loop(0, 2, fill, jnp.zeros_like(image))


def move_mask(placement: Placement, mask: jax.Array) -> jax.Array:
    """The moved mask `[h, w]` of integers with its dtype; nearest, so no class is made up."""
    if placement.matrix is None:
        return mask
    return _nearest(placement, mask[..., None])[..., 0]


def move_boxes(placement: Placement, boxes: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The boxes `[n, 4]` float32 around the moved ones, clipped to the image of `size` (h, w).

    A box is (top, left, bottom, right) in pixels; pixel i reaches from i to i + 1. Where a side
    lies on the border and the placement repeats the edge there, the box has the repeated pixels
    too, as the mask of the object has them (of an elastic placement to about a pixel). A box
    without area, as padding has it, and one that leaves the image come back as four zeros.
    """
    if placement.matrix is None:
        return boxes
    edge = jnp.linspace(0.0, 1.0, _EDGE_POINTS if placement.controls is not None else 1, False)
    zero, one = jnp.zeros_like(edge), jnp.ones_like(edge)
    # Once around the box, each corner once.
    down = jnp.concatenate([zero, edge, one, 1.0 - edge])
    right = jnp.concatenate([edge, one, 1.0 - edge, zero])
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    points = low + jnp.stack([down, right], axis=-1) * (high - low)
    limit = jnp.array(size, jnp.float32)
    moved = jnp.clip(_forward(placement, points - 0.5, size) + 0.5, 0.0, limit)
    moved = jnp.concatenate([moved.min(1), moved.max(1)], axis=-1)
    moved = jnp.where(_has_area(moved)[:, None], moved, jnp.array(_NOTHING))
    repeated = _repeated_boxes(placement, boxes, size)
    found = jnp.concatenate(
        [jnp.minimum(moved, repeated)[:, :2], jnp.maximum(moved, repeated)[:, 2:]], axis=-1
    )
    kept = _has_area(boxes) & _has_area(found)
    return jnp.where(kept[:, None], found, 0.0)


def _repeated_boxes(placement: Placement, boxes: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Around the pixels `[n, 4]` of the result's border that repeat an edge which is in a box.

    What is repeated lies between the moved object and the border of the result, so that the
    pixels along the border tell how far it reaches.
    """
    sides = jnp.array(size, jnp.float32)
    last = sides - 1.0
    rows, columns = (jnp.arange(side, dtype=jnp.float32) for side in size)
    border = [(0.0, columns), (last[0], columns), (rows, 0.0), (rows, last[1])]
    pixel = jnp.concatenate([jnp.stack(jnp.broadcast_arrays(*line), axis=-1) for line in border])
    point = pixel
    if placement.controls is not None:
        point = pixel + sides * _displacement(placement.controls, pixel, size)
    source = jnp.stack(_source(placement, point[:, 0], point[:, 1], size), axis=-1)
    # As the mask is read: the nearest pixel of the source is one within the image, or is repeated.
    nearest = jnp.floor(source + 0.5)
    edge = jnp.clip(nearest, 0.0, last)
    inside = (edge + 0.5 > boxes[:, None, :2]) & (edge + 0.5 < boxes[:, None, 2:])
    repeated = (inside.all(-1) & (nearest != edge).any(-1))[..., None]
    low = jnp.where(repeated, pixel, jnp.inf).min(1)
    high = jnp.where(repeated, pixel + 1.0, -jnp.inf).max(1)
    return jnp.concatenate([low, high], axis=-1)


def _has_area(boxes: jax.Array) -> jax.Array:
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def _nearest(placement: Placement, image: jax.Array) -> jax.Array:
    """The source's nearest pixels; for flips, turns and shifts the exact result."""
    rows, columns = _source_pixels(placement, image.shape[:2])
    row, column = (jnp.floor(axis + 0.5).astype(jnp.int32) for axis in (rows, columns))
    return _pixels(image, row, column)


def _bilinear(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The image `[..., c]` at positions `[...]` that all lie within it."""
    height, width, _ = image.shape
    above, left = (jnp.floor(axis).astype(jnp.int32) for axis in (rows, columns))
    below, right = jnp.minimum(above + 1, height - 1), jnp.minimum(left + 1, width - 1)
    down, across = ((axis - jnp.floor(axis))[..., None] for axis in (rows, columns))
    # Four plain reads: on a CPU faster than reads of 2 x 2 patches or of neighbours laid together.
    start = _lerp(_pixels(image, above, left), _pixels(image, below, left), down)
    end = _lerp(_pixels(image, above, right), _pixels(image, below, right), down)
    return _lerp(start, end, across)


def _pixels(image: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    """The pixels `[..., c]` at whole positions that all lie within the image."""
    height, width, channels = image.shape
    flat = jnp.asarray(image).reshape(height * width, channels)
    return flat.at[row * width + column].get(mode="promise_in_bounds")


def _lerp(start: jax.Array, end: jax.Array, fraction: jax.Array) -> jax.Array:
    return start + fraction * (end - start)


def _source_pixels(placement: Placement, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Rows and columns `[h, w]` of the source for the result's pixels, within the image."""
    rows, columns = (jnp.arange(side, dtype=jnp.float32) for side in size)
    points = jnp.broadcast_to(rows[:, None], size), jnp.broadcast_to(columns, size)
    if placement.controls is not None:
        weights = _spline(rows, size[0]), _spline(columns, size[1])
        bend = jnp.einsum("hi,wj,dij->dhw", *weights, placement.controls, precision="highest")
        points = points[0] + size[0] * bend[0], points[1] + size[1] * bend[1]
    source = _source(placement, *points, size)
    return tuple(jnp.clip(at, 0.0, side - 1.0) for at, side in zip(source, size, strict=True))


def _source(
    placement: Placement, rows: jax.Array, columns: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Where in the source, or beyond it, points come from that have passed the displacement."""
    centre = [(side - 1) / 2 for side in size]
    row, column = rows - centre[0], columns - centre[1]
    return tuple(
        m[0] * row + m[1] * column + m[2] + middle
        for m, middle in zip(placement.matrix[:2], centre, strict=True)
    )


def _forward(placement: Placement, points: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Where points `[..., 2]` (row, column) of the source come to lie in the result."""
    sides = jnp.array(size, jnp.float32)
    centre = (sides - 1.0) / 2.0
    (a, b, down), (c, d, right), _ = placement.matrix
    row, column = points[..., 0] - centre[0] - down, points[..., 1] - centre[1] - right
    turned = jnp.stack([d * row - b * column, a * column - c * row], axis=-1)
    target = turned / (a * d - b * c) + centre
    if placement.controls is None:
        return target

    def step(_, found):
        return target - sides * _displacement(placement.controls, found, size)

    return jax.lax.fori_loop(0, _INVERSE_STEPS, step, target)


def _displacement(controls: jax.Array, points: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The elastic displacement `[..., 2]` at points `[..., 2]`, in fractions of the side.

    Cubic B-splines over the grid (Rueckert et al. 1999, equation 1). With controls within +-m the
    slope of a spline along an axis is at most 1.5 m a cell, so that points at a distance d (the
    larger of both axes) differ by at most 2 * 1.5 * 4 * m * d = 0.72 d at the largest strength:
    the map p -> p + displacement(p) cannot fold, and p <- target - displacement(p) converges to
    its inverse. Beyond the image the displacement of its edge goes on.
    """
    down = _spline(points[..., 0], size[0])
    right = _spline(points[..., 1], size[1])
    return jnp.einsum("...i,...j,dij->...d", down, right, controls, precision="highest")


def _spline(position: jax.Array, side: int) -> jax.Array:
    """The weights `[..., 7]` of the controls at pixel positions `[...]` along a side."""
    cell = jnp.clip((position + 0.5) * (_CELLS / side), 0.0, _CELLS)
    away = jnp.abs(cell[..., None] - jnp.arange(-1.0, _CONTROLS - 1.0))
    near = 2.0 / 3.0 - away**2 * (1.0 - away / 2.0)
    return jnp.where(away < 1.0, near, jnp.maximum(2.0 - away, 0.0) ** 3 / 6.0)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    # In full precision: a coordinate of 500 pixels has no digits to lose.
    return jnp.matmul(left, right, precision="highest")


def _affine(rows: tuple, columns: tuple) -> jax.Array:
    """The homogeneous matrix `[3, 3]` of one line for rows and one for columns."""
    return jnp.array([rows, columns, (0.0, 0.0, 1.0)], jnp.float32)


def _rotate(key: jax.Array, degrees: Strength) -> jax.Array:
    angle = jnp.deg2rad(degrees * _either_way(key))
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    return _affine((cosine, -sine, 0.0), (sine, cosine, 0.0))


def _shear(key: jax.Array, degrees: Strength) -> jax.Array:
    down, right = jnp.tan(jnp.deg2rad(degrees * _either_way(key, (2,))))
    return _affine((1.0, down, 0.0), (right, 1.0, 0.0))


def _scale(key: jax.Array, strength: Strength) -> jax.Array:
    factor = 1.0 / (1.0 + strength * _either_way(key))
    return _affine((factor, 0.0, 0.0), (0.0, factor, 0.0))


def _crop(key: jax.Array, largest: Strength, size: tuple[int, int]) -> jax.Array:
    cut, down, right = jax.random.uniform(key, (3,))
    side = jnp.sqrt(1.0 - largest * cut)
    rest = (1.0 - side) * jnp.array(size, jnp.float32)
    return _affine((side, 0.0, rest[0] * (down - 0.5)), (0.0, side, rest[1] * (right - 0.5)))


def _quarter_turns(key: jax.Array, probability: Strength) -> jax.Array:
    happens, which = jax.random.split(key)
    turned = jax.random.bernoulli(happens, probability)
    turns = jnp.where(turned, jax.random.randint(which, (), 1, 4), 0)
    cosine = jnp.array([1.0, 0.0, -1.0, 0.0])[turns]
    sine = jnp.array([0.0, 1.0, 0.0, -1.0])[turns]
    return _affine((cosine, -sine, 0.0), (sine, cosine, 0.0))


def _shift(key: jax.Array, fraction: Strength, size: tuple[int, int]) -> jax.Array:
    most = jnp.round(fraction * jnp.array(size, jnp.float32)).astype(jnp.int32)
    down, right = (jax.random.randint(key, (2,), 0, 2 * most + 1) - most).astype(jnp.float32)
    return _affine((1.0, 0.0, down), (0.0, 1.0, right))


def _flip(key: jax.Array, probability: Strength, axis: int) -> jax.Array:
    sign = jnp.where(jax.random.bernoulli(key, probability), -1.0, 1.0)
    return jnp.eye(3).at[axis, axis].set(sign)


def _either_way(key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
