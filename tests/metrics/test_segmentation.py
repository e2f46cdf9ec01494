import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn import metrics as sk

from medtl_jax.metrics.scores import prepare, task_scores
from medtl_jax.metrics.surfaces import surface_scores

NAMES = ("background", "nucleus", "border")


def scored(called, k, certainty=0.8):
    """float16 `[n, h, w, k]`, whose argmax is `called`."""
    rest = (1 - certainty) / (k - 1)
    return np.where(np.eye(k, dtype=bool)[called], certainty, rest).astype(np.float16)


def outline_points(mask):
    """Pixels of the mask with one of four neighbours outside, by plain loops."""
    padded = np.pad(mask, 1)
    return np.array(
        [
            (y, x)
            for y, x in np.argwhere(mask)
            if not (
                padded[y, x + 1] and padded[y + 2, x + 1]
                and padded[y + 1, x] and padded[y + 1, x + 2]
            )
        ]
    )  # fmt: skip


def test_hand_computed_squares():
    # Two 10 x 10 squares, the second 3 to the right: 70 of 100 pixels in common.
    truth, called = np.zeros((2, 1, 32, 40), np.uint8)
    truth[0, 8:18, 5:15] = 1
    called[0, 8:18, 8:18] = 1
    result = task_scores("segment", truth, scored(called, 2), NAMES[:2])
    want = {
        "dice": 140 / 200, "iou": 70 / 130, "dice_pooled": 0.7, "iou_pooled": 70 / 130,
        "precision": 0.7, "recall": 0.7, "specificity": (1280 - 130) / (1280 - 100),
        "accuracy": (1280 - 60) / 1280,
        # Moved by 3, no outline pixel can be further away; the 10 of 36 on the outer side are that.
        "hd95": 3,
    }  # fmt: skip
    for name, value in want.items():
        assert result[name].value == pytest.approx(value, abs=1e-12), name
        assert result[name].n == 1
    assert result["dice/nucleus"] == result["dice"] and "dice/background" not in result
    within = task_scores("segment", truth, scored(called, 2), NAMES[:2], tolerance=3)
    assert within["nsd"].value == 1 > result["nsd"].value
    plain = task_scores("segment", truth, scored(called, 2), NAMES[:2], surfaces=False)
    assert result.keys() - plain.keys() == {"hd95", "nsd", "hd95/nucleus", "nsd/nucleus"}


@settings(max_examples=40)
@given(st.integers(1, 14), st.integers(1, 14), st.floats(0.05, 0.95), st.integers(0, 2**32 - 1))
def test_surface_scores_equal_brute_force(h, w, density, seed):
    rng = np.random.default_rng(seed)
    truth, called = rng.random((2, h, w)) < density
    hd95, nsd = surface_scores(truth, called, 1.5)
    if not truth.any() and not called.any():
        assert math.isnan(hd95) and math.isnan(nsd)
    elif not truth.any() or not called.any():
        assert (hd95, nsd) == (pytest.approx(math.hypot(h - 1, w - 1)), 0)
    else:
        apart = cdist(outline_points(truth), outline_points(called))
        there, back = apart.min(axis=1), apart.min(axis=0)
        want = max(np.percentile(there, 95), np.percentile(back, 95))
        assert hd95 == pytest.approx(want, abs=1e-12)
        near = (there <= 1.5).sum() + (back <= 1.5).sum()
        assert nsd == pytest.approx(near / (len(there) + len(back)), abs=1e-12)


def test_a_distance_equal_to_the_tolerance_is_within():
    truth, called = np.zeros((2, 5, 9), bool)
    truth[2, 2] = called[2, 4] = True
    assert surface_scores(truth, called, 2.0) == (2.0, 1.0)
    assert surface_scores(truth, called, 1.99) == (2.0, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_overlaps_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    truth, called = rng.integers(0, 3, (2, 7, 9, 11)).astype(np.uint8)
    result = task_scores("segment", truth, scored(called, 3), NAMES)
    for c, name in ((1, "nucleus"), (2, "border")):
        flat = (truth == c).ravel(), (called == c).ravel()
        pairs = [((t == c).ravel(), (p == c).ravel()) for t, p in zip(truth, called, strict=True)]
        want = {
            "dice": np.mean([sk.f1_score(*pair) for pair in pairs]),
            "iou": np.mean([sk.jaccard_score(*pair) for pair in pairs]),
            "dice_pooled": sk.f1_score(*flat),
            "iou_pooled": sk.jaccard_score(*flat),
            "precision": sk.precision_score(*flat),
            "recall": sk.recall_score(*flat),
            "specificity": sk.recall_score(*flat, pos_label=False),
        }
        for metric, value in want.items():
            assert result[f"{metric}/{name}"].value == pytest.approx(value, abs=1e-12), metric
    assert result["accuracy"].value == pytest.approx(np.mean(truth == called))
    assert result["dice"].value == pytest.approx(
        (result["dice/nucleus"].value + result["dice/border"].value) / 2
    )
    cases = prepare("segment", truth, scored(called, 3), NAMES, surfaces=False)
    np.testing.assert_array_equal(
        cases.tables.sum(axis=0), sk.confusion_matrix(truth.ravel(), called.ravel())
    )


@pytest.mark.parametrize("k", [2, 3])
def test_calibration_counts_every_pixel_as_an_image_of_its_own(k):
    rng = np.random.default_rng(k)
    truth = rng.integers(0, k, (5, 9, 11)).astype(np.uint8)
    score = rng.dirichlet(np.ones(k), (5, 9, 11)).astype(np.float16)
    found = task_scores("segment", truth, score, NAMES[:k])
    pixels = task_scores("classify", truth.ravel(), score.reshape(-1, k), NAMES[:k])
    for metric in ("ece", "brier", "nll"):
        assert found[metric].value == pytest.approx(pixels[metric].value, rel=1e-5)
        assert found[metric].n == 5


def test_images_without_the_class_are_left_out_and_missed_ones_count():
    truth, called = np.zeros((2, 3, 20, 21), np.uint8)
    truth[0, 2:9, 2:9] = called[0, 2:9, 2:9] = 1  # found
    truth[1, 2:9, 2:9] = 1  # missed
    result = task_scores("segment", truth, scored(called, 3), NAMES)
    assert result["dice/nucleus"].value == result["iou/nucleus"].value == 0.5
    assert result["nsd/nucleus"].value == 0.5
    assert result["hd95/nucleus"].value == pytest.approx(math.hypot(19, 20) / 2)
    assert result["dice/nucleus"].n == 2 and result["dice_pooled/nucleus"].n == 3
    assert result["dice_pooled/nucleus"].value == pytest.approx(2 * 49 / (98 + 49))
    assert math.isnan(result["dice/border"].value) and math.isnan(result["dice"].value)
    assert result["dice"].reason == "class 'border' is neither present nor predicted"
    assert result["precision/border"].reason == "no pixel was predicted as 'border'"
    assert result["recall/border"].reason == "no pixel of class 'border'"
    # An object where there is none counts as 0, too.
    called[2, 5, 5] = 1
    assert task_scores("segment", truth, scored(called, 3), NAMES)[
        "dice/nucleus"
    ].value == pytest.approx(1 / 3)


def test_an_image_of_one_class_alone():
    truth = np.ones((1, 4, 4), np.uint8)
    result = task_scores("segment", truth, scored(truth, 2), NAMES[:2])
    assert result["specificity"].reason == "every pixel is of class 'nucleus'"
    assert result["dice"].value == result["accuracy"].value == 1 and result["hd95"].value == 0


class Rows:
    """The little that a streamed array offers."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.most = 0

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        assert isinstance(rows, slice | np.ndarray)
        taken = self.array[rows]
        self.most = max(self.most, len(taken))
        return taken


def test_streamed_targets_are_read_a_few_at_a_time():
    rng = np.random.default_rng(0)
    truth, called = rng.integers(0, 3, (2, 40, 6, 6)).astype(np.uint8)
    mask = rng.random(40) < 0.8
    streamed = Rows(truth)
    result = task_scores("segment", streamed, scored(called, 3), NAMES, mask=mask)
    assert repr(result) == repr(task_scores("segment", truth[mask], scored(called[mask], 3), NAMES))
    assert streamed.most <= 8


def test_surfaces_of_a_test_split_are_quick():
    rng = np.random.default_rng(0)
    truth = np.kron(rng.random((34, 32, 32)) < 0.3, np.ones((8, 8))).astype(np.uint8)
    score = scored(np.roll(truth, 1, axis=1), 2)
    start = time.process_time()
    task_scores("segment", truth, score, NAMES[:2])
    # A quarter of 134 images of 256 x 256 pixels, for which ten seconds are allowed.
    assert time.process_time() - start < 2.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": np.zeros((2, 4, 4), np.uint8)}, r"\[n, h, w\]"),
        ({"target": np.full((1, 4, 4), 3, np.uint8)}, "targets in 0..2"),
        ({"target": np.zeros((1, 4, 4), np.float32)}, "integer"),
        ({"score": np.full((1, 4, 4, 3), 0.6, np.float16)}, "sum 1"),
        ({"score": np.full((1, 4, 4, 3), np.nan, np.float16)}, "NaN"),
        ({"classes": ("a", "b")}, "3 different class names"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
    ],
)
def test_arguments_that_do_not_hold_together(change, words):
    whole = {
        "target": np.zeros((1, 4, 4), np.uint8),
        "score": scored(np.zeros((1, 4, 4), int), 3),
        "classes": NAMES,
    }
    with pytest.raises(ValueError, match=words):
        task_scores("segment", **(whole | change))
