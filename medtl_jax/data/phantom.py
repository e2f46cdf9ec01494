"""The embedded default data set: synthetic cross-sectional slices of two scanners.

Every slice is drawn in coordinates relative to the field of view, so a given (seed, split, index)
is the same slice at every image size. The four classes differ in the *local structure* of one
finding (margin, wall, spicules, internal texture); its position, size, contrast and the number of
focal structures in the slice come from the same draws in every class.
"""

import dataclasses
import functools

import numpy as np
from scipy import ndimage

from medtl_jax.data import catalog
from medtl_jax.errors import UserError

CLASSES = ("normal", "cyst", "nodule", "infiltrate")
DOMAINS = ("a", "b", "mixed")
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 32, 512
FIELD_OF_VIEW_MM = 256.0

# Difficulty. Grey values are fractions of the scanner's range, lengths are fractions of half the
# field of view. A higher contrast and a lower noise level make every class easier to tell.
LESION_CONTRAST = (0.12, 0.22)
LESION_RADIUS = (0.14, 0.21)
NOISE_LEVEL = 1.0
TEXTURE_LEVEL = 0.03
BENIGN_FOCI = (1, 2)
CALCIFICATIONS = (2, 7)

# Slices are drawn on at least this many pixels a side and block-averaged down to smaller sizes,
# which gives small images their partial-volume blur instead of aliasing.
_MIN_GRID = 128
_SLICES_PER_BLOCK = 6
_PATIENT, _CHOICE, _LABEL, _ANATOMY, _SLICE, _SCAN = range(6)
_ALL = slice(None)
_Rng = np.random.Generator
_Key = tuple[int, int]  # seed, number of the split
_Pair = tuple[np.ndarray, np.ndarray]
_Focus = tuple[float, float, float]  # centre y and x, radius

# The range (low, high) of each trait that tells one kind of focal structure from another; "normal"
# is the benign, smooth kind that is also found beside every lesion. In this order:
#   edge      width of the margin, as a fraction of the radius
#   wall      brightness of an enhancing rim, as a multiple of the contrast
#   spicules  length of the radiating strands, as a fraction of the radius
#   mottle    amplitude of a coarse internal texture, as a multiple of the contrast
#   mesh      amplitude of a fine internal net, as a multiple of the contrast
#   ragged    displacement of the margin by noise, as a fraction of the radius
#   flatness  how much of the surrounding texture the structure hides
_TRAITS = {
    "normal": ((0.25, 0.60), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0), (0.4, 0.7)),
    "cyst": ((0.10, 0.35), (0.4, 1.0), (0, 0), (0, 0), (0, 0), (0, 0), (0.6, 1.0)),
    "nodule": ((0.10, 0.30), (0, 0), (0.6, 1.0), (0.3, 0.7), (0, 0), (0, 0), (0.4, 0.7)),
    "infiltrate": ((0.35, 0.80), (0, 0), (0, 0), (0, 0), (0.5, 1.0), (0.15, 0.35), (0.2, 0.5)),
}


@dataclasses.dataclass(frozen=True)
class _Scanner:
    """How a scanner turns tissue into grey values; lengths in fractions of half the field."""

    gain: float  # grey = gain * tissue ** gamma + offset
    offset: float
    gamma: float
    blur: float  # standard deviation of the point spread function
    noise: float  # standard deviation of the noise, in grey values
    grain: tuple[float, float]  # correlation lengths (y, x) of the noise; 0 is white
    rician: bool  # magnitude of a complex signal (MRI) instead of additive noise
    bias: float  # strength of the multiplicative bias field
    tilt: float  # linear fall-off of the bias field from the front to the back
    stripes: float  # amplitude of vertical stripes, as a fraction of the signal


_SCANNERS = (
    _Scanner(1.0, 0.0, 1.0, 0.008, 0.022, (0.0, 0.0), True, 0.08, 0.0, 0.0),
    _Scanner(0.85, 0.10, 0.8, 0.011, 0.020, (0.005, 0.012), False, 0.10, 0.22, 0.015),
)


def make_phantom(
    image_size: int,
    *,
    train: int = 900,
    val: int = 200,
    test: int = 400,
    domain: str = "a",
    seed: int = 0,
    splits: tuple[str, ...] = catalog.SPLITS,
) -> catalog.Dataset:
    """Return the phantom data set, with `image_size` pixels a side.

    Every slice is a pure function of (seed, split, index, image_size, scanner). Domains "a" and "b"
    show the same anatomy and lesions under two scanners; "mixed" sends each patient to one of them.

    Args:
      image_size: pixels a side, 32 to 512.
      train, val, test: number of slices in the split, at least as many as classes.
      domain: "a", "b" or "mixed".
      seed: a non-negative integer; another seed draws other patients.
      splits: the splits to draw, in their usual order.

    Returns:
      A `Dataset` whose splits hold uint8 images `[n, s, s, 1]`, int32 labels, ids and patients
      (1 to 3 slices a patient, none in two splits) and, in `extra`,
      `mask` uint8 `[n, s, s]`: 1 on the lesion, all 0 in class "normal";
      `size` float32 `[n]`: area of that mask in mm^2, for a field of view of 256 mm;
      `boxes` float32 `[n, 4]`: (y0, x0, y1, x1) of that mask in pixels, ends exclusive, 0 for none;
      `domain` int32 `[n]`: 0 for scanner a, 1 for scanner b.

    Raises:
      UserError: for an argument outside these ranges.
    """
    counts = {"train": train, "val": val, "test": test}
    _check_arguments(image_size, counts, domain, seed)
    source = f"medtl_jax.data.phantom, scanner {domain}, seed {seed}"
    spec = catalog.DataSpec("phantom", "classify", CLASSES, "Apache-2.0 (generated)", source)
    # Threads do not help: the array operations of one slice are too short to leave the lock.
    wanted = [name for name in catalog.SPLITS if name in splits]
    made = {name: _make_split(image_size, name, counts[name], domain, seed) for name in wanted}
    return catalog.Dataset(spec, made)


def _check_arguments(image_size: int, counts: dict[str, int], domain: str, seed: int) -> None:
    if domain not in DOMAINS:
        raise UserError(f"phantom: domain {domain!r} is unknown; use one of {', '.join(DOMAINS)}")
    for name, value, low, high in (
        ("image_size", image_size, MIN_IMAGE_SIZE, MAX_IMAGE_SIZE),
        *((f"{split} count", n, len(CLASSES), None) for split, n in counts.items()),
        ("seed", seed, 0, None),
    ):
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < low or (high is not None and value > high):
            span = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise UserError(f"phantom: {name} is {value!r}; give a whole number {span}")


def _make_split(size: int, name: str, n: int, domain: str, seed: int) -> catalog.Split:
    """The first `n` slices of a split."""
    key = (int(seed), catalog.SPLITS.index(name))
    labels = np.array([_label(key, i) for i in range(n)], np.int32)
    firsts = np.array([_first_slice_of_patient(key, i) for i in range(n)])
    if domain == "mixed":
        scanners = np.array([_rng(key, _CHOICE, i).integers(2) for i in firsts], np.int32)
    else:
        scanners = np.full(n, DOMAINS.index(domain), np.int32)
    grid = size * -(-_MIN_GRID // size)
    images = np.empty((n, size, size, 1), np.uint8)
    mask = np.empty((n, size, size), np.uint8)
    for i in range(n):
        tissue, coverage = _draw_slice(key, i, firsts[i], CLASSES[labels[i]], grid)
        grey = _scan(_rng(key, _SCAN, i), tissue, _SCANNERS[scanners[i]]).clip(0.0, 1.0)
        images[i, :, :, 0] = np.rint(255.0 * _block_mean(grey, size))
        mask[i] = _block_mean(coverage, size) >= 0.5
    area = (mask.sum((1, 2)) * (FIELD_OF_VIEW_MM / size) ** 2).astype(np.float32)
    boxes = np.stack([_box(m) for m in mask])
    extra = {"mask": mask, "size": area, "boxes": boxes, "domain": scanners}
    ids = np.array([f"phantom-{name}-{i:05d}" for i in range(n)])
    patients = np.array([f"phantom-{name}-patient-{first:05d}" for first in firsts])
    return catalog.Split(images, labels, ids, patients, extra)


def _rng(key: _Key, stream: int, index: int) -> _Rng:
    """The generator of one named stream, e.g. the scanner noise of slice `index` of a split."""
    return np.random.default_rng([*key, stream, int(index)])


def _label(key: _Key, index: int) -> int:
    """The class of a slice: each run of four consecutive slices holds every class once."""
    block, place = divmod(index, len(CLASSES))
    return int(_rng(key, _LABEL, block).permutation(len(CLASSES))[place])


def _first_slice_of_patient(key: _Key, index: int) -> int:
    """The index of the first slice of this slice's patient, who has 1 to 3 slices in a row."""
    block, place = divmod(index, _SLICES_PER_BLOCK)
    lengths = _rng(key, _PATIENT, block).integers(1, 4, _SLICES_PER_BLOCK)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return block * _SLICES_PER_BLOCK + int(starts[starts <= place].max())


def _box(mask: np.ndarray) -> np.ndarray:
    """The box (y0, x0, y1, x1) of a mask [s, s], float32, y1 and x1 exclusive; zeros if empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return np.zeros(4, np.float32)
    return np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1], np.float32)


def _block_mean(image: np.ndarray, size: int) -> np.ndarray:
    """`image` [r, r] averaged over blocks to [size, size]."""
    factor = len(image) // size
    return image.reshape(size, factor, size, factor).mean((1, 3))


@functools.lru_cache(maxsize=64)
def _spline_taps(cells: int, size: int) -> _Pair:
    """Knot indices int [4, size] and cubic B-spline weights float32 [4, size] of pixel centres."""
    position = (np.arange(size) + 0.5) / size * cells
    base = position.astype(int)
    t = position - base
    u = 1 - t
    weights = np.stack([u**3, 3 * t**3 - 6 * t**2 + 4, 3 * u**3 - 6 * u**2 + 4, t**3])
    return base + np.arange(4)[:, None], (weights / 6).astype(np.float32)


def _smooth_noise(
    rng: _Rng, cells: int, size: int, rows: slice = _ALL, columns: slice = _ALL
) -> np.ndarray:
    """The window of a random field float32 [size, size] of unit variance, `cells` knots a side.

    The knots, not the pixels, take the draws: the field is the same at every size.
    """
    lattice = rng.standard_normal((cells + 3, cells + 3), np.float32)
    taps, weights = _spline_taps(cells, size)
    across = np.einsum("kts,ts->ks", lattice[:, taps[:, columns]], weights[:, columns])
    field = np.einsum("tsx,ts->sx", across[taps[:, rows]], weights[:, rows])
    return field * np.float32(315 / 151)  # the mean square of the spline's weights is (151/315)^2


def _step(distance: np.ndarray, width: float) -> np.ndarray:
    """A smooth step from 0 to 1 as `distance` goes from -width/2 to width/2."""
    t = np.clip(distance * np.float32(1.0 / width) + np.float32(0.5), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _paint(image: np.ndarray, cover: np.ndarray, value: float) -> None:
    """Put tissue of grey level `value` over `image`, in place, where `cover` is 1."""
    image += cover * (np.float32(value) - image)


def _draw_slice(key: _Key, index: int, first: int, kind: str, size: int) -> _Pair:
    """Tissue float32 [size, size] in 0..1 before scanning, and the lesion's coverage of a pixel."""
    rng = _rng(key, _SLICE, index)
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * (2.0 / size) - 1.0).astype(np.float32)
    pose = {"turn": rng.uniform(-0.2, 0.2), "zoom": rng.uniform(0.92, 1.05)}
    pose["y"], pose["x"] = rng.uniform(-0.06, 0.06, 2)
    tissue, inside = _draw_anatomy(_rng(key, _ANATOMY, first), rng, pose, axis)
    _add_texture(rng, tissue, inside)
    foci = _place_foci(rng, pose)
    # The first focus is the lesion; it is painted last, so that no distractor hides it.
    for focus in foci[:0:-1]:
        _paint_focus(rng, tissue, inside, axis, focus, "normal")
    coverage = _paint_focus(rng, tissue, inside, axis, foci[0], kind)
    if kind == "normal":
        coverage[:] = 0.0
    _add_calcifications(rng, tissue, axis, pose)
    return tissue, coverage


def _draw_anatomy(patient: _Rng, rng: _Rng, pose: dict, axis: np.ndarray) -> _Pair:
    """Tissue [r, r] of an axial slice of the trunk, and where its soft organs are (0..1)."""
    size = len(axis)
    cos, sin = np.cos(pose["turn"]), np.sin(pose["turn"])
    v, u = (axis[:, None] - np.float32(pose["y"])), (axis[None, :] - np.float32(pose["x"]))
    y = np.float32(cos / pose["zoom"]) * v - np.float32(sin / pose["zoom"]) * u
    x = np.float32(sin / pose["zoom"]) * v + np.float32(cos / pose["zoom"]) * u
    y = y + 0.03 * _smooth_noise(patient, 5, size) + 0.012 * _smooth_noise(rng, 9, size)
    x = x + 0.03 * _smooth_noise(patient, 5, size) + 0.012 * _smooth_noise(rng, 9, size)
    edge = max(0.02, 3.0 / size)

    def ellipse(cy: float, cx: float, ry: float, rx: float) -> np.ndarray:
        cy, cx = (c + patient.uniform(-0.04, 0.04) for c in (cy, cx))
        ry, rx = (r * patient.uniform(0.85, 1.15) for r in (ry, rx))
        radius = np.sqrt(((y - np.float32(cy)) / ry) ** 2 + ((x - np.float32(cx)) / rx) ** 2)
        return _step((1.0 - radius) * np.float32(min(ry, rx)), edge)

    height, width = patient.uniform(0.66, 0.76), patient.uniform(0.84, 0.92)
    depth = (1.0 - np.sqrt((y / np.float32(height)) ** 2 + (x / np.float32(width)) ** 2)) * height
    fat = patient.uniform(0.05, 0.12)
    image = np.full((size, size), 0.02, np.float32)
    inside = _step(depth - (fat + 0.06), edge)
    for start, value in ((0.0, 0.55), (0.02, 0.72), (fat, 0.36), (fat + 0.06, 0.52)):
        _paint(image, _step(depth - start, edge), value * patient.uniform(0.93, 1.07))
    angle = np.arctan2(y, x)
    waves = np.cos(patient.integers(8, 12) * angle + patient.uniform(0, 6.28))
    _paint(image, _step(waves * 0.03 - 0.012 - np.abs(depth - (fat + 0.03)), 0.02), 0.85)  # ribs
    for organ in ((-0.08, -0.40, 0.36, 0.36), (-0.05, 0.52, 0.26, 0.18), (-0.26, 0.16, 0.18, 0.26)):
        _paint(image, ellipse(*organ) * inside, patient.uniform(0.36, 0.50))  # liver spleen stomach
    for side in (-0.42, 0.42):
        _paint(image, ellipse(0.30, side, 0.15, 0.11) * inside, patient.uniform(0.52, 0.60))
        _paint(image, ellipse(0.30, side, 0.07, 0.04) * inside, patient.uniform(0.42, 0.50))
    _paint(image, ellipse(0.12, 0.06, 0.06, 0.06), patient.uniform(0.56, 0.66))  # aorta
    _paint(image, ellipse(0.34, 0.0, 0.14, 0.15), 0.88)  # vertebra: cortex, marrow, canal
    _paint(image, ellipse(0.34, 0.0, 0.10, 0.11), patient.uniform(0.56, 0.66))
    _paint(image, ellipse(0.53, 0.0, 0.10, 0.05), 0.82)
    _paint(image, ellipse(0.49, 0.0, 0.045, 0.05), 0.30)
    return image, inside


def _add_texture(rng: _Rng, tissue: np.ndarray, inside: np.ndarray) -> None:
    """Add parenchymal texture everywhere in the body and vessels in the organs, in place."""
    size = len(tissue)
    grain = sum(w * _smooth_noise(rng, k, size) for k, w in ((12, 0.5), (28, 0.6), (56, 0.7)))
    tissue += np.float32(TEXTURE_LEVEL) * grain * np.sqrt(tissue)
    # A vessel tree seen in one slice: zero crossings of a smooth field, broken up by another one.
    for cells, width in ((6, 0.10), (11, 0.13)):
        line = 1.0 - _step(np.abs(_smooth_noise(rng, cells, size)) - width, 0.2)
        gate = _step(_smooth_noise(rng, 5, size) - 0.2, 0.6)
        tissue += np.float32(rng.choice([-1, 1]) * rng.uniform(0.05, 0.13)) * line * gate * inside


def _place_foci(rng: _Rng, pose: dict) -> list[_Focus]:
    """Centres and radii (y, x, r) of the focal structures; the first one is the lesion, if any."""
    cos, sin, zoom = np.cos(pose["turn"]), np.sin(pose["turn"]), pose["zoom"]
    # Taken as placed already: the vertebra, in the coordinates of the body.
    placed = [(0.40, 0.0, 0.16)]
    for _ in range(1 + rng.integers(BENIGN_FOCI[0], BENIGN_FOCI[1] + 1)):
        radius = rng.uniform(*LESION_RADIUS)
        reach, angle = np.sqrt(rng.uniform(0, 1, 32)), rng.uniform(0, 2 * np.pi, 32)
        y, x = 0.38 * reach * np.sin(angle), 0.52 * reach * np.cos(angle)
        gaps = [np.hypot(y - cy, x - cx) - 1.15 * (r + radius) for cy, cx, r in placed]
        best = np.argmax(np.minimum(np.min(gaps, 0), 0.0))  # the first that fits, else the nearest
        placed.append((y[best], x[best], radius))
    return [
        (zoom * (cos * y + sin * x) + pose["y"], zoom * (cos * x - sin * y) + pose["x"], r)
        for y, x, r in placed[1:]
    ]


def _paint_focus(
    rng: _Rng, tissue: np.ndarray, inside: np.ndarray, axis: np.ndarray, focus: _Focus, kind: str
) -> np.ndarray:
    """Paint one focal structure into `tissue`, in place; its coverage [r, r] in 0..1."""
    size = len(axis)
    edge, wall, spicules, *texture, ragged, flatness = rng.uniform(*np.transpose(_TRAITS[kind]))
    contrast = rng.choice([-1, 1]) * rng.uniform(*LESION_CONTRAST)
    cy, cx, radius = focus
    # Nothing of a focus lies further out: (outline + margin / 2 + strands or ragged) * stretch.
    reach = 2.9 * radius
    window = tuple(slice(*np.searchsorted(axis, [c - reach, c + reach])) for c in (cy, cx))
    shift, mottle, mesh = (
        _smooth_noise(rng, k, size, *window).clip(-1.8, 1.8) for k in (12, 20, 36)
    )
    y, x = axis[window[0], None] - cy, axis[None, window[1]] - cx
    depth = _depth(rng, y, x, radius, spicules)
    depth += np.float32(ragged * radius) * shift
    cover = _step(depth, max(edge * radius, 3.0 / size)) * inside[window]
    rim = _step(0.09 * radius - np.abs(depth - 0.05 * radius), max(0.12 * radius, 3.0 / size))
    local = tissue[window]
    mean = (cover * local).sum() / cover.sum()
    net = np.clip(1.2 - 2.2 * np.abs(mesh), -1.2, 1.2)
    own = contrast + abs(contrast) * (texture[0] * mottle + texture[1] * net)
    tissue[window] += cover * (flatness * (mean - local) + own)
    tissue[window] += rim * inside[window] * np.float32(1.2 * wall * abs(contrast))
    coverage = np.zeros_like(tissue)
    coverage[window] = cover
    return coverage


def _depth(rng: _Rng, y: np.ndarray, x: np.ndarray, radius: float, spicules: float) -> np.ndarray:
    """Distance [h, w] inside the outline (negative outside) of an irregular, spiculated disc."""
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(0.85, 1.18)
    u = (np.cos(turn) * x + np.sin(turn) * y) * stretch
    v = (np.cos(turn) * y - np.sin(turn) * x) / stretch
    angle = np.arctan2(v, u)
    outline = 1.0 + sum(
        rng.uniform(0, 0.07) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5)
    )
    count = rng.integers(7, 11)
    centres = (np.arange(count) + rng.uniform(-0.2, 0.2, count)) * (2 * np.pi / count)
    lengths = rng.uniform(0.4, 1.0, count)
    if spicules:
        # Von Mises bumps of concentration 36: strands with a standard deviation of 1/6 rad.
        bumps = np.exp(36.0 * (np.cos(angle[..., None] - centres) - 1.0))
        strands = np.einsum("hwn,n->hw", bumps, lengths)
        # The body of a spiculated focus shrinks, so that its area stays that of the other kinds.
        outline = outline + spicules * (strands - 0.45)
    return ((outline - np.hypot(u, v) / radius) * radius).astype(np.float32)


def _add_calcifications(rng: _Rng, tissue: np.ndarray, axis: np.ndarray, pose: dict) -> None:
    """Add small bright spots at random places of the body, in place."""
    for _ in range(rng.integers(CALCIFICATIONS[0], CALCIFICATIONS[1] + 1)):
        cy, cx = (pose[c] + rng.uniform(-0.5, 0.5) for c in "yx")
        width, height = rng.uniform(0.012, 0.022), rng.uniform(0.1, 0.3)
        profile = [np.exp(-0.5 * ((axis - c) / width) ** 2) for c in (cy, cx)]
        tissue += np.float32(height) * np.outer(*profile).astype(np.float32)


def _scan(rng: _Rng, tissue: np.ndarray, scanner: _Scanner) -> np.ndarray:
    """Grey values float32 [r, r], about 0..1, of `tissue` [r, r] as the scanner shows it."""
    size, half = len(tissue), len(tissue) / 2.0
    level = rng.uniform(0.93, 1.07)
    bias = scanner.bias * _smooth_noise(rng, 2, size)
    slope = rng.uniform(0.6, 1.4) * scanner.tilt
    bias -= np.float32(slope) * np.linspace(-1, 1, size, dtype=np.float32)[:, None]
    stripes = np.sin(np.linspace(0, 2 * np.pi * rng.integers(14, 20), size) + rng.uniform(0, 6.28))
    signal = ndimage.gaussian_filter(np.clip(tissue, 0.0, 1.2), scanner.blur * half, truncate=3.0)
    signal = scanner.gain * signal**scanner.gamma + scanner.offset
    signal *= np.exp(bias) * (level * (1.0 + scanner.stripes * stripes)).astype(np.float32)
    noise = rng.standard_normal((2, size, size), np.float32)
    if any(scanner.grain):
        sigma = [g * half for g in scanner.grain]
        noise = ndimage.gaussian_filter(noise, (0.0, *sigma), mode="wrap", truncate=3.0)
        noise /= noise.std()
    noise *= np.float32(scanner.noise * NOISE_LEVEL)
    signal += noise[0]
    return np.hypot(signal, noise[1]) if scanner.rician else signal
