"""Means over seeds, their intervals and verdicts, against scipy, scikit-learn and by hand."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import mean_absolute_error, roc_auc_score

from medtl_jax.errors import UserError
from medtl_jax.metrics.pairing import Predicted
from medtl_jax.metrics.seeds import (
    Estimate,
    Sampled,
    difference,
    judge,
    over_seeds,
    pick,
    sample_runs,
)

IDS = np.array([f"image{i:03d}" for i in range(120)])


def run(noise: float, seed: int = 0, *, name: str = "run", n: int = 120, **changes) -> Predicted:
    """Two classes; the same truth for every seed, other errors."""
    target = np.arange(n, dtype=np.int32) % 2
    z = 2.0 * target - 1 + noise * np.random.default_rng(seed).normal(size=n)
    p = 1 / (1 + np.exp(-z))
    score = np.stack([1 - p, p], axis=1).astype(np.float32)
    given = {"ids": IDS[:n], "target": target, "score": score, "patients": None}
    return Predicted(name, "classify", ("well", "ill"), **(given | changes))


def sampled(value: float, draws, units: int = 50) -> Sampled:
    return Sampled({"auc": value}, {"auc": np.asarray(draws, float)}, units)


def test_values_are_those_of_scikit_learn_and_draws_spread_as_the_binomial():
    one = run(1.5)
    (found,) = sample_runs([one], resamples=4000)
    right = (one.score.argmax(axis=1) == one.target).mean()
    assert found.values["auc"] == pytest.approx(roc_auc_score(one.target, one.score[:, 1]))
    assert found.values["accuracy"] == pytest.approx(right)
    assert found.units == 120
    expected = math.sqrt(right * (1 - right) / 120)
    assert found.draws["accuracy"].std() == pytest.approx(expected, rel=0.05)


def test_every_run_is_scored_on_the_same_draws_whatever_its_order():
    first, turned = run(1.0), run(1.0)
    back = slice(None, None, -1)
    turned = run(1.0, ids=turned.ids[back], target=turned.target[back], score=turned.score[back])
    a, b = sample_runs([first, turned], resamples=50, seed=3)
    np.testing.assert_array_equal(a.draws["auc"], b.draws["auc"])
    assert np.ptp(a.draws["auc"]) > 0
    with pytest.raises(UserError, match="did not predict the same images"):
        list(sample_runs([first, run(1.0, n=60)], resamples=5))


def test_whole_patients_are_drawn():
    patients = np.repeat([f"p{i}" for i in range(12)], 10)
    (found,) = sample_runs([run(1.0, patients=patients)], resamples=20)
    assert found.units == 12


def test_both_variances_add_up_as_in_welchs_test():
    """The mean of seeds about that of images is what Welch's test has: two variances, two sizes."""
    rng = np.random.default_rng(0)
    images, seeds = rng.normal(0.0, 3.0, 50), rng.normal(0.8, 1.0, 4)
    seeds += images.mean()  # now the value is the difference of both means
    value = seeds.mean() - images.mean()
    error = images.std(ddof=1) / math.sqrt(50)
    # Two draws at equal distances have any variance that one wants.
    reach = error * math.sqrt(49 / 50)
    samples = [sampled(one - images.mean(), [value - reach, value + reach]) for one in seeds]
    found = difference(samples, [sampled(0.0, [0.0, 0.0])] * 4, "auc")
    welch = stats.ttest_ind(seeds, images, equal_var=False)
    assert found.value == pytest.approx(value)
    assert found.p == pytest.approx(welch.pvalue, rel=1e-9)
    wanted = welch.confidence_interval()
    assert found.interval == pytest.approx((wanted.low, wanted.high), rel=1e-9)
    assert found.images == pytest.approx(stats.t.interval(0.95, 49, value, error), rel=1e-9)
    alone = stats.t.interval(0.95, 3, value, stats.sem(seeds))
    assert found.seeds == pytest.approx(alone, rel=1e-9)
    assert found.spread == pytest.approx(seeds.std(ddof=1))
    assert found.by_seed == pytest.approx(tuple(seeds - images.mean()))


def test_the_draws_of_a_mean_are_means_of_draws():
    # Opposite draws of two seeds: their mean does not depend on the images.
    pair = [sampled(0.8, [0.7, 0.9]), sampled(0.6, [0.7, 0.5])]
    found = over_seeds(pair, "auc")
    assert found.value == pytest.approx(0.7)
    assert found.images == pytest.approx((0.7, 0.7))
    assert found.interval == pytest.approx(found.seeds)


def test_one_seed_covers_images_alone():
    found = over_seeds([sampled(0.8, [0.7, 0.9])], "auc")
    error = 0.1 * math.sqrt(50 / 49)
    assert math.isnan(found.spread) and found.seeds is None
    assert found.interval == found.images
    low, high = stats.t.interval(0.95, 49, 0.8, error)
    assert found.interval == pytest.approx((low, min(high, 1.0)))


def test_equal_seeds_cover_images_alone():
    """As k-NN on all images, which no seed changes."""
    one = sample_runs([run(1.5)], resamples=200)
    (first,) = one
    found, alone = over_seeds([first] * 3, "accuracy"), over_seeds([first], "accuracy")
    assert found.spread == 0 and found.interval == pytest.approx(alone.interval)
    assert found.images == pytest.approx(alone.images)
    assert found.seeds == pytest.approx((found.value, found.value))


def test_no_interval_of_a_mean_leaves_the_range_of_its_metric():
    high = over_seeds([sampled(0.99, [0.9, 1.0]), sampled(0.97, [0.9, 1.0])], "auc")
    assert high.interval[1] == high.images[1] == 1.0 and high.interval[0] < 0.9
    low = [sampled(0.1, [0.0, 0.2]), sampled(0.7, [0.6, 0.8])]
    assert over_seeds(low, "auc").interval == (0.0, 1.0)
    kappa = [Sampled({"quadratic_kappa": v}, {"quadratic_kappa": np.full(9, v)}, 9) for v in (0, 1)]
    assert over_seeds(kappa, "quadratic_kappa").interval == (-1.0, 1.0)
    error = Sampled({"mae": 0.1}, {"mae": np.array([0.0, 2.0])}, 9)
    assert over_seeds([error], "mae").interval[0] == 0.0
    assert over_seeds([error], "mae").interval[1] > 1.0
    apart = difference([sampled(0.9, [0.0, 2.0])], [sampled(0.1, [0.0, 0.0])], "auc")
    assert apart.interval[1] > 1.0, "a difference has no such range"


def test_what_two_strategies_share_does_not_widen_their_difference():
    easy = np.linspace(-0.2, 0.2, 50)  # draws of easy and of hard images
    one = [sampled(0.80 + s, 0.80 + s + easy) for s in (0.0, 0.1, -0.1)]
    other = [
        sampled(0.83 + s, 0.83 + s + 1e-3 * (i + easy)) for i, s in enumerate((0.0, 0.1, -0.1))
    ]
    same = [sampled(0.83 + s, 0.83 + s + easy + 1e-6 * easy) for s in (0.0, 0.1, -0.1)]
    assert difference(same, one, "auc").p < 1e-6
    assert difference(other, one, "auc").p > 0.5
    with pytest.raises(ValueError):
        difference(same[:2], one, "auc")


def test_equal_runs_do_not_differ():
    samples = list(sample_runs([run(1.0, seed) for seed in (1, 2)], resamples=50))
    found = difference(samples, samples, "accuracy")
    assert (found.value, found.p, found.interval) == (0.0, 1.0, None)
    assert "which does not mean certainty" in found.reason
    assert judge({"same": {"accuracy": found}})["same"]["accuracy"].verdict == "cannot tell"


def test_undefined_is_no_number_and_no_verdict():
    one_class = run(1.0, target=np.zeros(120, np.int32))
    (found,) = sample_runs([one_class], resamples=20)
    estimate = over_seeds([found], "auc")
    assert math.isnan(estimate.value) and estimate.interval is None
    assert estimate.reason == "undefined on the test split"
    verdict = judge({"a": {"auc": difference([found], [found], "auc")}})["a"]["auc"]
    assert verdict.verdict == "undefined" and math.isnan(verdict.adjusted)
    few = over_seeds([sampled(0.5, [0.4, 0.6, *[math.nan] * 8])], "auc")
    assert few.interval is None and "undefined in 8 of 10 resamples" in few.reason
    assert over_seeds([sampled(0.5, [0.4, 0.6], units=1)], "auc").interval is None


def estimate(value: float, p: float) -> Estimate:
    return Estimate(value, (value,), math.nan, p=p)


def test_verdicts_are_holms_over_strategies_and_metrics():
    found = judge({
        "up": {"auc": estimate(0.1, 0.01), "mae": estimate(0.1, 0.012)},
        "down": {"auc": estimate(-0.1, 0.03), "mae": estimate(-0.1, 0.002)},
    })  # fmt: skip
    adjusted = {name: {m: one.adjusted for m, one in f.items()} for name, f in found.items()}
    assert adjusted["down"]["mae"] == pytest.approx(0.008)
    assert adjusted["up"]["auc"] == pytest.approx(0.03)
    assert adjusted["up"]["mae"] == pytest.approx(0.03)
    assert adjusted["down"]["auc"] == pytest.approx(0.03)
    verdicts = {name: {m: one.verdict for m, one in f.items()} for name, f in found.items()}
    assert verdicts == {
        "up": {"auc": "better", "mae": "worse"},
        "down": {"auc": "worse", "mae": "better"},
    }
    alone = judge({"a": {"auc": estimate(0.1, 0.04)}, "b": {"auc": estimate(0.1, 0.03)}})
    assert [alone[name]["auc"].verdict for name in "ab"] == ["cannot tell"] * 2


def test_the_errors_of_several_numbers_stay_apart():
    target = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 60.0]], np.float32)
    score = target + np.array([[1.0, 5.0]], np.float32)
    many = Predicted("r", "regress", ("age", "height"), IDS[:4], target, score)
    (found,) = sample_runs([many], resamples=10)
    for k, name in enumerate(many.classes):
        wanted = mean_absolute_error(target[:, k], score[:, k])
        assert found.values[f"mae/{name}"] == pytest.approx(wanted)
    assert set(found.values) == {"mae/age", "mae/height"}


def test_masks_and_findings_have_their_primary_metric():
    masks = np.zeros((3, 4, 4), np.uint8)
    masks[:, :2] = 1
    score = np.eye(2, dtype=np.float16)[masks]
    score[0] = score[0][..., ::-1]
    segment = Predicted("s", "segment", ("back", "cyst"), IDS[:3], masks, score)
    (found,) = sample_runs([segment], resamples=10)
    assert found.values == {"dice": pytest.approx(2 / 3)}
    target = np.array([[1, 0], [0, 1], [1, -1], [0, 0]], np.int8)
    findings = Predicted(
        "m", "multilabel", ("a", "b"), IDS[:4], target, np.abs(target).astype(np.float32)
    )
    (found,) = sample_runs([findings], resamples=10)
    assert found.values == {"auc": pytest.approx(1.0)}


def test_the_pick_is_the_best_mean_of_the_validation_values():
    validation = {"a": (0.3, 0.5), "b": (0.41, 0.37), "c": (0.1, None), "d": (math.nan, 0.0)}
    assert pick(validation, more_is_better=False) == "b"
    assert pick(validation, more_is_better=True) == "a"
    assert pick({"late": (0.5,), "same": (0.5,)}, more_is_better=False) == "late"
    assert pick({"a": (None,), "b": (math.inf,)}, more_is_better=False) == ""
