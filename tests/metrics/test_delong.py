"""DeLong's errors against sums over all pairs, a published example, and simulations."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from medtl_jax.metrics.delong import auc_interval, auc_test


def kernel(target: np.ndarray, score: np.ndarray) -> np.ndarray:
    """`[positives, negatives]`: 1 where the positive has the higher score, a half for a tie."""
    gap = score[target == 1][:, None] - score[target == 0][None, :]
    return (gap > 0) + 0.5 * (gap == 0)


def brute_covariance(target, scores, patients) -> np.ndarray:
    """Obuchowski (1997), section 2, as written there: sums over patients of sums over images."""
    members = list(dict.fromkeys(patients))
    m, n = int((target == 1).sum()), int((target == 0).sum())
    wins = [kernel(target, score) for score in scores]
    areas = [win.mean() for win in wins]
    sums = np.zeros((2, len(scores), len(members)))
    for j, member in enumerate(members):
        of_positives = patients[target == 1] == member
        of_negatives = patients[target == 0] == member
        for s, (win, area) in enumerate(zip(wins, areas, strict=True)):
            sums[0, s, j] = sum(row.mean() - area for row in win[of_positives])
            sums[1, s, j] = sum(column.mean() - area for column in win.T[of_negatives])
    with_positive = len(set(patients[target == 1]))
    with_negative = len(set(patients[target == 0]))
    s10 = with_positive / ((with_positive - 1) * m) * sums[0] @ sums[0].T
    s01 = with_negative / ((with_negative - 1) * n) * sums[1] @ sums[1].T
    s11 = len(members) / (len(members) - 1) * sums[0] @ sums[1].T
    return s10 / m + s01 / n + (s11 + s11.T) / (m * n)


def brute_degrees(target, score, patients) -> float:
    """Satterthwaite's degrees of freedom of one AUC: two variances, each from so many patients."""
    win = kernel(target, score)
    pieces = []
    for side, values in ((1, win.mean(axis=1)), (0, win.mean(axis=0))):
        who = patients[target == side]
        residual = (values - win.mean()) / len(values)
        sums = [residual[who == member].sum() for member in set(who)]
        pieces.append((np.square(sums).sum(), len(sums) - 1))
    return sum(v for v, _ in pieces) ** 2 / sum(v * v / free for v, free in pieces)


def draw(seed: int, n: int = 41, of_patients: int = 0):
    """Target, two scores with many ties, patients."""
    rng = np.random.default_rng(seed)
    target = np.arange(n) % 3 == 0
    common = rng.normal(size=n)
    scores = [np.round(target + common + rng.normal(size=n), 1) for _ in range(2)]
    patients = rng.integers(0, of_patients, n) if of_patients else np.arange(n)
    return target, scores, patients


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("of_patients", [0, 12])
def test_equals_sums_over_all_pairs(seed, of_patients):
    target, scores, patients = draw(seed, of_patients=of_patients)
    covariance = brute_covariance(target, scores, patients)
    known = patients if of_patients else None
    difference, error, p = auc_test(target, *scores, known)
    wanted = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert error == pytest.approx(math.sqrt(wanted), abs=1e-12)
    areas = [kernel(target, score).mean() for score in scores]
    assert difference == pytest.approx(areas[1] - areas[0], abs=1e-12)
    assert p == pytest.approx(math.erfc(abs(difference) / error / math.sqrt(2)), abs=1e-12)
    centre = math.log(areas[0] / (1 - areas[0]))
    reach = stats.t.ppf(0.975, brute_degrees(target, scores[0], patients))
    half = reach * math.sqrt(covariance[0, 0]) / (areas[0] * (1 - areas[0]))
    wanted = [1 / (1 + math.exp(-edge)) for edge in (centre - half, centre + half)]
    assert auc_interval(target, scores[0], patients=known) == pytest.approx(wanted, abs=1e-12)


def test_without_correction_for_few_units_it_is_delongs_own_formula():
    """One image a patient: the cross term is 0 and the sums are variances with n - 1."""
    target, scores, _ = draw(7)
    wins = [kernel(target, score) for score in scores]
    gap = wins[1] - wins[0]
    m, n = gap.shape
    wanted = gap.mean(axis=1).var(ddof=1) / m + gap.mean(axis=0).var(ddof=1) / n
    assert auc_test(target, *scores)[1] == pytest.approx(math.sqrt(wanted), abs=1e-12)


def test_published_example():
    """Hanley & McNeil (1982), table I: 109 CT scans in five ratings.

    DeLong's error 0.0307 and the interval 0.83295 to 0.95339 are those that Stata's manual
    prints for `roctab` on these data; ours is on the logit scale, so the error is recovered.
    """
    healthy, ill = (33, 6, 6, 11, 2), (3, 2, 2, 11, 33)
    target = np.repeat([0, 1], [sum(healthy), sum(ill)])
    rating = np.concatenate([np.repeat(np.arange(1, 6), counts) for counts in (healthy, ill)])
    difference, error, _ = auc_test(target, np.zeros(109), rating)
    area = difference + 0.5
    assert area == pytest.approx(0.8932, abs=5e-5)
    assert error == pytest.approx(0.0307, abs=5e-5)
    half = 1.959963984540054 * error
    assert (area - half, area + half) == pytest.approx((0.83295, 0.95339), abs=5e-6)
    low, high = auc_interval(target, rating)
    logit = [math.log(edge / (1 - edge)) for edge in (low, area, high)]
    assert logit[2] - logit[1] == pytest.approx(logit[1] - logit[0], abs=1e-12)
    reach = stats.t.ppf(0.975, brute_degrees(target, rating, np.arange(109)))
    assert reach == pytest.approx(1.99, abs=0.005)
    wanted = reach * error / (area * (1 - area))
    assert logit[2] - logit[1] == pytest.approx(wanted, abs=1e-12)


@given(st.integers(0, 10_000))
def test_only_the_order_counts(seed):
    target, (a, b), _ = draw(seed)
    wanted = auc_test(target, a, b)
    assert auc_test(target, 3 * a + 1, np.exp(b)) == wanted
    turned = auc_test(~target, -a, -b)
    assert turned == pytest.approx(wanted, abs=1e-12)
    swapped = auc_test(target, b, a)
    assert swapped == pytest.approx((-wanted[0], wanted[1], wanted[2]), abs=1e-12)


def test_macro_average_of_two_mirrored_classes_is_the_one_class():
    target, (a, b), _ = draw(3)
    both = np.stack([~target, target], 1)
    macro = auc_test(both, np.stack([-a, a], 1), np.stack([-b, b], 1))
    assert macro == pytest.approx(auc_test(target, a, b), abs=1e-12)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_macro_error_is_the_jackknife_error(missing):
    """The spread of the macro AUC, leaving out one image at a time, is nearly the same number."""
    rng = np.random.default_rng(5)
    n, k = 120, 3
    label = rng.integers(0, k, n)
    target = np.eye(k, dtype=int)[label]
    target[rng.random((n, k)) < missing] = -1
    common = rng.normal(size=(n, k))
    scores = [common + np.eye(k)[label] + 0.7 * rng.normal(size=(n, k)) for _ in range(2)]

    def gap(keep):
        areas = []
        for score in scores:
            columns = zip(target[keep].T, score[keep].T, strict=True)
            areas.append(np.mean([roc_auc_score(t[t >= 0], s[t >= 0]) for t, s in columns]))
        return areas[1] - areas[0]

    everyone = np.arange(n)
    left = np.array([gap(np.delete(everyone, i)) for i in everyone])
    jackknife = math.sqrt((n - 1) / n * np.square(left - left.mean()).sum())
    difference, error, _ = auc_test(target, *scores)
    assert difference == pytest.approx(gap(everyone), abs=1e-12)
    assert error == pytest.approx(jackknife, rel=0.03)


def test_copies_of_every_image_leave_the_error_as_it_is_where_patients_are_known():
    target, scores, _ = draw(2, n=60)
    patients = np.tile(np.arange(60), 3)
    tripled = np.tile(target, 3), *(np.tile(score, 3) for score in scores)
    once = auc_test(target, *scores)
    assert auc_test(*tripled, patients) == pytest.approx(once, abs=1e-12)
    assert auc_test(*tripled)[1] < 0.6 * once[1]
    wanted = auc_interval(target, scores[0])
    assert auc_interval(tripled[0], tripled[1], patients=patients) == pytest.approx(wanted)


def test_where_there_is_no_interval():
    target = np.array([0, 0, 0, 1, 1, 1])
    score = np.array([0.1, 0.2, 0.6, 0.5, 0.8, 0.9])
    assert auc_interval(target, score) is not None
    assert auc_interval(target, target) is None, "an AUC of 1 has no variance"
    assert auc_interval(target, -target) is None, "nor one of 0"
    assert auc_interval(target[:4], score[:4]) is None, "one positive"
    assert auc_interval(np.ones(6, int), score) is None
    assert auc_interval(target, score, patients=[1, 1, 1, 2, 2, 2]) is None
    assert auc_interval(target, np.zeros(6)) is None, "a constant has no variance"
    wide, narrow = (auc_interval(target, score, level) for level in (0.95, 0.5))
    assert 0 < wide[0] < narrow[0] < narrow[1] < wide[1] < 1


def test_where_there_is_no_test():
    target = np.array([0, 0, 0, 1, 1, 1])
    score = np.array([0.1, 0.2, 0.6, 0.5, 0.8, 0.9])
    assert auc_test(target, score, 2 * score) == (0.0, 0.0, 1.0)
    assert np.isnan(auc_test(np.zeros(6, int), score, -score)).all()
    difference, error, p = auc_test(target, -target, target)
    assert (difference, error) == (1.0, 0.0) and math.isnan(p)
    difference, error, p = auc_test(target[:4], score[:4], -score[:4])
    assert difference == pytest.approx(-1 / 3) and math.isnan(error) and math.isnan(p)


def test_few_positives_are_held_to_a_wider_distribution():
    """The degrees of freedom are Satterthwaite's: here about those of the 4 positives."""
    rng = np.random.default_rng(0)
    target = np.arange(400) < 4
    a, b = rng.normal(size=(2, 400)) + 1.0 * target
    difference, error, normal = auc_test(target, a, b)
    careful = auc_test(target, a, b, small_sample=True)
    assert careful[:2] == (difference, error)
    # Two-sided p of t with 3 degrees of freedom, in closed form.
    x = abs(difference) / error / math.sqrt(3)
    three = 1 - 2 / math.pi * (math.atan(x) + x / (1 + x * x))
    assert careful[2] == pytest.approx(three, rel=0.02)
    assert careful[2] > normal


def test_findings_of_the_same_few_images_are_no_more_certain_than_one():
    """Eight copies of a finding have the degrees of freedom of the one; others do not take them."""
    rng = np.random.default_rng(0)
    target = np.arange(200) < 4
    a, b = rng.normal(size=(2, 200)) + target
    once = auc_test(target, a, b, small_sample=True)
    copies = (np.tile(column[:, None], 8) for column in (target, a, b))
    assert auc_test(*copies, small_sample=True) == pytest.approx(once, abs=1e-12)


@pytest.mark.parametrize(
    ("target", "score", "patients", "word"),
    [
        ([0, 1], [0.1, 0.2, 0.3], None, "one shape"),
        ([], [], None, "at least one image"),
        ([0, 2], [0.1, 0.2], None, "targets 0, 1 or -1"),
        ([0, 1], [0.1, math.nan], None, "NaN or infinity"),
        ([0, 1], [0.1, 0.2], ["a"], "patient for each"),
    ],
)
def test_unusable_arguments(target, score, patients, word):
    with pytest.raises(ValueError, match=word):
        auc_interval(np.array(target), np.array(score), patients=patients)


def test_a_level_that_is_none():
    with pytest.raises(ValueError, match="level"):
        auc_interval(np.array([0, 1]), np.array([0.1, 0.2]), level=1.0)


@pytest.mark.slow
def test_intervals_cover_the_true_area():
    """Two normal distributions 1.2 apart: the area is Phi(1.2 / sqrt 2) = 0.80193."""
    rng = np.random.default_rng(1)
    target = np.arange(120) < 40
    covered = 0
    for _ in range(2000):
        low, high = auc_interval(target, rng.normal(size=120) + 1.2 * target)
        covered += low <= 0.8019306 <= high
    assert 0.93 <= covered / 2000 <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("positives", "area"), [(10, 0.9), (10, 0.97), (6, 0.9)])
def test_intervals_of_few_positives_cover_the_true_area(positives, area):
    rng = np.random.default_rng(positives)
    target = np.arange(100) < positives
    gap, covered, given = math.sqrt(2) * stats.norm.ppf(area), 0, 0
    for _ in range(2000):
        found = auc_interval(target, rng.normal(size=100) + gap * target)
        if found is not None:
            given += 1
            covered += found[0] <= area <= found[1]
    assert given > 1900 and 0.91 <= covered / given <= 0.97


@pytest.mark.slow
def test_intervals_of_few_patients_cover_the_true_area():
    """16 patients of six images, which share seven tenths of their variance."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(16), 6)
    target, gap, covered = patients < 8, math.sqrt(2) * stats.norm.ppf(0.85), 0
    for _ in range(2000):
        shared = rng.normal(size=16)[patients]
        score = math.sqrt(0.7) * shared + math.sqrt(0.3) * rng.normal(size=96) + gap * target
        low, high = auc_interval(target, score, patients=patients)
        covered += low <= 0.85 <= high
    assert 0.925 <= covered / 2000 <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 8])
def test_false_differences_of_findings_of_the_same_six_images(k):
    rng, target, false = np.random.default_rng(k), np.zeros((120, k), int), 0
    target[:6] = 1
    for _ in range(2000):
        shared = rng.normal(size=(2, 120, 1))
        a, b = target + 0.95 * shared + 0.3 * rng.normal(size=(2, 120, k))
        false += auc_test(target, a, b, small_sample=True)[2] <= 0.05
    # 5 % and 2.6 standard errors.
    assert 0.02 < false / 2000 <= 0.063
