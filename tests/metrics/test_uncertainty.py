import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from medtl_jax.metrics import delong
from medtl_jax.metrics.intervals import (
    Draws,
    Share,
    bootstrap_counts,
    counts_without,
    interval_of,
)
from medtl_jax.metrics.scores import prepare, scored_classes, task_module, task_scores
from medtl_jax.metrics.uncertainty import (
    overall_scores,
    score_with_intervals,
    weighted_scores,
)

SIMULATIONS = 600
NAMES = ("normal", "benign", "malignant", "artefact")


def predictions(n, k, seed, skill=1.0):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, k, n)
    # One decimal: many ties.
    logit = np.round(rng.normal(size=(n, k)) + skill * np.eye(k)[target], 1)
    score = np.exp(logit)
    return target, score / score.sum(axis=1, keepdims=True)


def arguments(task, n, k, seed):
    """Random target, score and names of a task, with ties, missing labels and absent classes."""
    rng = np.random.default_rng(seed)
    names = NAMES[:k]
    if task == "segment":
        called = rng.integers(0, k, (n, 3, 4))
        target = np.where(rng.random(called.shape) < 0.5, called, rng.integers(0, k, called.shape))
        return (
            target.astype(np.uint8),
            (np.eye(k)[called] * 0.5 + 0.5 / k).astype(np.float16),
            names,
        )
    if task == "multilabel":
        return rng.integers(-1, 2, (n, k)), np.round(rng.random((n, k)), 1), names
    if task == "regress":
        target = rng.integers(0, 20, (n, k)).astype(np.float32)
        target[rng.random((n, k)) < 0.2] = np.nan
        return target, rng.integers(0, 20, (n, k)).astype(np.float32), names
    return *predictions(n, k, seed), names


@pytest.mark.parametrize("task", ["classify", "ordinal", "multilabel", "segment", "regress"])
@settings(max_examples=20)
@given(n=st.integers(2, 30), k=st.integers(2, 4), seed=st.integers(0, 2**32 - 1))
def test_weighted_scores_equal_those_of_repeated_rows(task, n, k, seed):
    target, score, names = arguments(task, n, k, seed)
    counts = np.random.default_rng(seed).integers(0, 3, size=(n, 5))
    counts[0] += 1
    cases = prepare(task, target, score, names)
    drawn, overall = weighted_scores(task, cases, counts), overall_scores(task, cases, counts)
    assert drawn.keys() == overall.keys()
    everyone = task_module(task).left_out(cases, np.ones((n, 1)))
    for column in range(5):
        rows = np.repeat(np.arange(n), counts[:, column])
        want = {
            name: entry.value
            for name, entry in task_scores(task, target[rows], score[rows], names).items()
            # Its findings are those of the whole split.
            if name != "auc_frequent"
        }
        for metric, out in task_module(task).left_out(cases, counts[:, [column]]).items():
            if not np.array_equal(out, everyone[metric]):
                want[metric] = math.nan  # a mean over other findings than those of the split
        found = {name: values[column] for name, values in overall.items() if name in want}
        for metric, values in drawn.items():
            for name, value in zip(scored_classes(task, names), values[:, column], strict=False):
                if f"{metric}/{name}" in want:
                    found[f"{metric}/{name}"] = value
        assert found.keys() == want.keys()
        np.testing.assert_allclose(
            list(found.values()), list(want.values()), rtol=1e-12, atol=1e-12, err_msg=str(want)
        )


def test_the_frequent_findings_stay_those_of_the_whole_split():
    rng = np.random.default_rng(0)
    target = (rng.random((100, 3)) < [0.5, 0.4, 0.1]).astype(np.int8)
    cases = prepare("multilabel", target, rng.random((100, 3)), NAMES[:3])
    counts = rng.multinomial(100, np.full(100, 0.01), size=50).T
    drawn = weighted_scores("multilabel", cases, counts)
    np.testing.assert_allclose(drawn["auc_frequent"][0], drawn["auc"][:2].mean(axis=0))


def test_interval_equals_an_explicit_bca_bootstrap():
    target, score = predictions(60, 3, 1)
    result = score_with_intervals(
        "classify", target, score, NAMES[:3], resamples=200, level=0.9, seed=5
    )
    counts = np.concatenate(list(bootstrap_counts(60, 60, 200, 5)), axis=1)

    def f1(rows):
        return sk.f1_score(target[rows], score[rows].argmax(axis=1), average="macro")

    drawn = np.array([f1(np.repeat(np.arange(60), column)) for column in counts.T])
    without = np.array([f1(np.arange(60) != i) for i in range(60)])
    influence = without.mean() - without
    acceleration = (influence**3).sum() / (influence**2).sum() ** 1.5 / 6
    bias = stats.norm.ppf((drawn < f1(np.arange(60))).mean())
    reach = stats.t.ppf(0.95, 59) * math.sqrt(60 / 59)
    ends = []
    for side in (-reach, reach):
        z = bias + (bias + side) / (1 - acceleration * (bias + side))
        ends.append(np.quantile(drawn, stats.norm.cdf(z)))
    np.testing.assert_allclose(result["f1"]["ci90"], ends, atol=1e-9)


def test_bca_interval_equals_that_of_scipy():
    # Large: Student's t is the normal, and what is left is the noise of other draws.
    rng = np.random.default_rng(2)
    error = rng.exponential(size=(1000, 1))
    found = score_with_intervals(
        "regress", np.zeros_like(error), error, ("a",), resamples=6000, seed=1
    )["mae"]["ci95"]
    want = stats.bootstrap(
        (error[:, 0],), np.mean, method="BCa", n_resamples=6000, rng=np.random.default_rng(3)
    ).confidence_interval
    assert found == pytest.approx(list(want), abs=0.05 * (want.high - want.low))


def of_two(right, wrong):
    """Target and score of images of two classes, the first `right` of which are told right."""
    target = np.arange(right + wrong) % 2
    called = np.where(np.arange(right + wrong) < right, target, 1 - target)
    return target, np.eye(2)[called] * 0.8 + 0.1


@pytest.mark.parametrize(
    ("right", "n", "want"),
    [
        (81, 263, [0.2553, 0.3662]),
        (15, 148, [0.0624, 0.1605]),
        (0, 20, [0, 0.1611]),
        (1, 29, [0.0061, 0.1718]),
    ],
)
def test_accuracy_has_the_published_score_interval(right, n, want):
    """Newcombe (1998), table I, method 3."""
    given = ("classify", *of_two(right, n - right), ("a", "b"))
    found = score_with_intervals(*given, resamples=10)["accuracy"]["ci95"]
    assert found == pytest.approx(want, abs=6e-5)


@pytest.mark.parametrize(("hits", "size", "want"), [(0, 20, [0, 0.1684]), (20, 20, [0.8316, 1])])
def test_patients_without_an_error_have_the_exact_interval_of_as_many_patients(hits, size, want):
    """Newcombe (1998), table I, method 5: 0 of 20; here 20 patients of three images each."""
    target, score = of_two(3 * hits, 3 * (size - hits))
    patients = np.arange(3 * size) % size
    found = score_with_intervals("classify", target, score, ("a", "b"), patients, resamples=50)
    assert found["accuracy"]["ci95"] == pytest.approx(want, abs=5e-5)
    assert "reason" not in found["accuracy"]


def test_what_is_no_proportion_has_no_interval_where_no_resample_differs():
    target, score = of_two(40, 0)
    found = score_with_intervals("classify", target, score, ("a", "b"), resamples=50)
    reason = "no resample differs, which does not mean certainty"
    for name in ("f1", "mcc", "kappa", "balanced_accuracy", "brier"):
        assert found[name]["ci95"] is None and found[name]["reason"] == reason
    assert found["auc"]["reason"] == f"{reason}; {delong.NO_INTERVAL}"
    for name in ("accuracy", "recall/a", "precision/b", "specificity/b"):
        low, high = found[name]["ci95"]
        assert low < 0.92 and high == 1 and "reason" not in found[name]


@pytest.mark.parametrize("n", [20, 50, 100])
def test_proportions_near_the_end_are_covered_exactly_computed(n):
    """The chance of each count is known: no simulation is needed."""
    ends = []
    for right in range(n + 1):
        draws = Draws({"x": np.zeros(1)}, {"x": np.zeros(1)}, n, {"x": Share(right, n, n)})
        ends.append(interval_of(draws, "x", right / n, 0.95, False)[0])
    low, high = np.array(ends).T
    truths = np.linspace(0.8, 0.995, 200)
    covered = [
        stats.binom(n, p).pmf(np.arange(n + 1))[(low <= p) & (p <= high)].sum() for p in truths
    ]
    assert 0.94 <= np.mean(covered) <= 0.97 and min(covered) > 0.83


def test_same_seed_same_numbers_and_json():
    target, score = predictions(80, 4, 3)
    first = score_with_intervals("classify", target, score, NAMES, resamples=100, seed=1)
    assert first == score_with_intervals("classify", target, score, NAMES, resamples=100, seed=1)
    other = score_with_intervals("classify", target, score, NAMES, resamples=100, seed=2)
    assert first["auc"]["ci95"] != other["auc"]["ci95"]
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    point = task_scores("classify", target, score, NAMES)
    assert first.keys() == point.keys()
    for name, entry in first.items():
        assert entry["value"] == point[name].value and entry["n"] == 80
        assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]
        assert "reason" not in entry and "n_patients" not in entry


def test_counts_draw_units_with_replacement():
    chunks = list(bootstrap_counts(units=30, images=2**20, resamples=5, seed=0))
    # 2^20 images leave room for two resamples in a chunk.
    assert [chunk.shape for chunk in chunks] == [(30, 2), (30, 2), (30, 1)]
    whole = np.concatenate(chunks, axis=1)
    assert (whole.sum(axis=0) == 30).all() and (whole >= 0).all()
    # The size of a chunk does not change the draws.
    np.testing.assert_array_equal(whole, next(bootstrap_counts(30, 30, 5, 0)))
    many = next(bootstrap_counts(50, 50, 4000, 1))
    # Binomial(50, 1/50): mean 1, variance 0.98.
    assert many.mean() == 1 and many.var() == pytest.approx(0.98, abs=0.02)


def test_every_unit_is_left_out_once():
    chunks = list(counts_without(units=5, images=2**20, seed=0))
    assert [chunk.shape for chunk in chunks] == [(5, 2), (5, 2), (5, 1)]
    whole = np.concatenate(chunks, axis=1)
    assert (whole.sum(axis=0) == 4).all() and (whole.sum(axis=1) == 4).all()
    # Many units in 200 parts of nearly one size.
    many = np.concatenate(list(counts_without(1001, 1001, 0)), axis=1)
    assert many.shape == (1001, 200) and (many.sum(axis=1) == 199).all()
    assert set(1001 - many.sum(axis=0)) == {5, 6}


def test_patients_are_drawn_whole():
    # Ten patients, each all right or all wrong: accuracy can only move in steps of a tenth.
    patients = np.repeat([f"p{i}" for i in range(10)], 20)
    target = np.zeros(200, int)
    score = np.where(np.repeat(np.arange(10) < 7, 20)[:, None], [0.9, 0.1], [0.1, 0.9])
    shuffled = np.random.default_rng(0).permutation(200)
    clustered = score_with_intervals(
        "classify", target, score[shuffled], ("a", "b"), patients[shuffled]
    )
    entry = clustered["brier"]
    assert entry["n"] == 200 and entry["n_patients"] == 10
    assert entry["value"] == pytest.approx(0.7 * 0.01 + 0.3 * 0.81)
    # The draws are those of ten images.
    ten = score_with_intervals("classify", target[::20], score[::20], ("a", "b"))["brier"]
    assert entry["ci95"] == pytest.approx(ten["ci95"])
    low, high = clustered["accuracy"]["ci95"]
    assert high - low > 0.4 and clustered["accuracy"]["value"] == pytest.approx(0.7)
    images = score_with_intervals("classify", target, score, ("a", "b"))["brier"]["ci95"]
    assert images[1] - images[0] < 0.5 * (entry["ci95"][1] - entry["ci95"][0])


def test_a_patient_per_image_changes_nothing_but_the_count():
    target, score = predictions(50, 2, 4)
    patients = np.array([f"{i:03d}" for i in range(50)])
    plain = score_with_intervals("classify", target, score, ("a", "b"), resamples=50)
    clustered = score_with_intervals("classify", target, score, ("a", "b"), patients, resamples=50)
    assert clustered == {name: entry | {"n_patients": 50} for name, entry in plain.items()}


def test_undefined_values_have_a_reason_and_no_interval():
    target, score = np.array([0, 0, 1, 1] * 5), np.tile([[0.6, 0.3, 0.1]], (20, 1))
    result = score_with_intervals("classify", target, score, ("a", "b", "gone"), resamples=50)
    assert result["recall/gone"] == {
        "value": None,
        "ci95": None,
        "n": 20,
        "reason": "no image of class 'gone'",
    }
    assert result["precision/b"]["value"] is None and result["accuracy"]["ci95"] is not None


def test_no_interval_where_many_resamples_are_undefined():
    # One image of class 1 among 40 is missing from (39/40)^40 = 36 % of the resamples.
    target = np.array([1] + [0] * 39)
    score = np.where(np.arange(40)[:, None] < 2, [0.2, 0.8], [0.8, 0.2])
    found = score_with_intervals("classify", target, score, ("a", "b"), seed=3)
    entry = found["pr_auc"]
    assert entry["value"] == 0.5 and entry["ci95"] is None
    missing = int(entry["reason"].split()[2])
    assert entry["reason"] == f"undefined in {missing} of 2000 resamples: too few images"
    assert missing / 2000 == pytest.approx((39 / 40) ** 40, abs=0.04)
    # Of one image the recall is known, if not well: z^2 = 3.84 and 1 / (1 + z^2).
    assert found["recall/b"]["ci95"] == pytest.approx([0.2065, 1], abs=5e-5)
    # Five images are missing from 0.4 %: the interval stands.
    target[:5] = 1
    assert score_with_intervals("classify", target, score, ("a", "b"), seed=3)["pr_auc"]["ci95"]


def test_one_patient_gives_no_interval():
    target, score = predictions(30, 2, 0)
    result = score_with_intervals(
        "classify", target, score, ("a", "b"), np.full(30, "p1"), resamples=20
    )
    assert result["accuracy"]["value"] is not None and result["accuracy"]["ci95"] is None
    assert result["accuracy"]["reason"] == "one patient only"


@pytest.mark.parametrize(
    "bad", [{"resamples": 0}, {"level": 1.0}, {"patients": np.array(["p"])}, {"classes": ("a",)}]
)
def test_unusable_arguments(bad):
    target, score = predictions(10, 2, 0)
    with pytest.raises(ValueError):
        score_with_intervals("classify", target, score, **({"classes": ("a", "b")} | bad))


def test_delong_intervals_stand_beside_the_auc():
    target, score = predictions(120, 3, 2)
    patients = np.arange(120) // 3
    result = score_with_intervals(
        "classify", target, score, NAMES[:3], patients, resamples=20, level=0.9
    )
    for i, name in enumerate(NAMES[:3]):
        want = delong.auc_interval(target == i, score[:, i], 0.9, patients)
        assert result[f"auc/{name}"]["delong90"] == pytest.approx(want)
    want = delong.auc_interval(np.eye(3, dtype=int)[target], score, 0.9, patients)
    assert result["auc"]["delong90"] == pytest.approx(want)
    assert {name for name, entry in result.items() if "delong90" in entry} == {
        "auc", *(f"auc/{name}" for name in NAMES[:3])
    }  # fmt: skip


def test_delong_of_two_classes_is_that_of_class_one():
    target, score = predictions(60, 2, 2)
    result = score_with_intervals("ordinal", target, score, ("a", "b"), resamples=20)
    want = delong.auc_interval(target == 1, score[:, 1], 0.95)
    for name in ("auc", "auc/a", "auc/b"):
        assert result[name]["delong95"] == pytest.approx(want)


def test_delong_of_findings_leaves_out_unknown_labels_and_undefined_findings():
    target, score, names = arguments("multilabel", 80, 3, 4)
    target[:, 2] = 0
    result = score_with_intervals("multilabel", target, score, names, resamples=20)
    for i in range(2):
        known = target[:, i] >= 0
        want = delong.auc_interval(target[known, i] == 1, score[known, i], 0.95)
        assert result[f"auc/{names[i]}"]["delong95"] == pytest.approx(want)
    assert result[f"auc/{names[2]}"]["delong95"] is None
    want = delong.auc_interval(target[:, :2], score[:, :2], 0.95)
    assert result["auc"]["delong95"] == result["auc_frequent"]["delong95"] == pytest.approx(want)


@pytest.mark.parametrize("task", ["ordinal", "multilabel", "segment", "regress"])
def test_every_task_has_intervals_ready_for_json(task):
    target, score, names = arguments(task, 40, 3, 6)
    mask = np.arange(40) < 35
    patients = np.arange(40) // 2
    result = score_with_intervals(
        task, target, score, names, patients, mask=mask, resamples=60, tolerance=1.0
    )
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    point = task_scores(task, target[mask], score[mask], names, tolerance=1.0)
    assert result.keys() == point.keys()
    for name, entry in result.items():
        assert entry["n"] == point[name].n and entry["n_patients"] == 18
        assert (entry["value"] is None) == math.isnan(point[name].value)
        if entry["value"] is not None:
            assert entry["value"] == point[name].value
            assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]
    kept = score_with_intervals(
        task, target[mask], score[mask], names, patients[mask], resamples=60, tolerance=1.0
    )
    assert result == kept


def test_an_average_over_some_findings_has_an_interval_and_names_the_others():
    target, score, names = arguments("multilabel", 60, 3, 1)
    target[:, 1] = 0
    result = score_with_intervals("multilabel", target, score, names, resamples=100)
    assert result["auc"]["ci95"] is not None
    assert result["auc"]["reason"] == "over 2 of 3 findings, without benign"
    # One positive: without it, in a third of the resamples, it would be the mean of two others.
    target[0, 1] = 1
    result = score_with_intervals("multilabel", target, score, names, resamples=100)
    for name in ("auc", "auc/benign", "recall", "f1"):
        assert result[name]["ci95"] is None and "of 100 resamples" in result[name]["reason"], name
    assert result["accuracy"]["ci95"] is not None
    assert delong.NO_INTERVAL in result["auc"]["reason"]


def test_the_calibration_error_of_a_calibrated_model_may_be_zero():
    rng = np.random.default_rng(0)
    positive = rng.random(300)
    target = (rng.random(300) < positive).astype(int)
    score = np.stack([1 - positive, positive], axis=1)
    entry = score_with_intervals("classify", target, score, ("a", "b"), resamples=300)["ece"]
    assert entry["ci95"][0] == 0 < entry["value"] < entry["ci95"][1]
    # A network that is sure of everything and right in half of it is not calibrated.
    wrong = score_with_intervals(
        "classify", target, np.tile([0.001, 0.999], (300, 1)), ("a", "b"), resamples=300
    )["ece"]
    assert wrong["ci95"][0] > 0.4


def test_many_units_are_left_out_in_parts():
    # The skewness of 3000 images, found from 200 parts instead of 3000.
    rng = np.random.default_rng(1)
    error = rng.exponential(size=(3000, 1))
    whole = score_with_intervals("regress", np.zeros_like(error), error, ("a",), resamples=4000)
    low, high = whole["mae"]["ci95"]
    # Of a mean of exponentials, exactly: a Gamma distribution.
    want = whole["mae"]["value"] / (stats.gamma.ppf([0.975, 0.025], 3000) / 3000)
    assert [low, high] == pytest.approx(want, abs=0.05 * (high - low))


def simulated(rng, n, per_patient=1):
    """Two classes of unit normals 1.5 apart; half of the variance is the patient's."""
    shared = np.repeat(rng.normal(size=n // per_patient), per_patient)
    own = rng.normal(size=n)
    noise = own if per_patient == 1 else (shared + own) / math.sqrt(2)
    target = np.repeat(rng.integers(0, 2, n // per_patient), per_patient)
    positive = stats.logistic.cdf(noise + 1.5 * target - 0.75)
    return target, np.stack([1 - positive, positive], axis=1)


@pytest.mark.slow
def test_the_mean_auc_of_findings_is_covered():
    """Two frequent findings of AUC 0.66 and one with eight positives of 0.92."""
    rng, gaps = np.random.default_rng(0), np.array([0.6, 0.6, 2.0])
    target = np.zeros((200, 3), int)
    target[:60, 0], target[::3, 1], target[::25, 2] = 1, 1, 1
    truth, inside = stats.norm.cdf(gaps / math.sqrt(2)).mean(), 0
    for repeat in range(300):
        score = stats.norm.cdf(rng.normal(size=(200, 3)) + target * gaps - 1)
        result = score_with_intervals(
            "multilabel", target, score, NAMES[:3], resamples=200, seed=repeat
        )
        low, high = result["auc"]["ci95"]
        inside += low <= truth <= high
    assert 0.91 <= inside / 300 <= 0.985


@pytest.mark.slow
@pytest.mark.parametrize(("n", "per_patient"), [(100, 1), (200, 4)])
def test_95_percent_intervals_cover_93_to_97_percent(n, per_patient):
    # AUC = Phi(1.5 / sqrt 2), accuracy at the middle = Phi(0.75).
    rng = np.random.default_rng(n + per_patient)
    truth = dict(zip(("accuracy", "auc"), stats.norm.cdf([0.75, 1.5 / math.sqrt(2)]), strict=True))
    inside = dict.fromkeys(truth, 0)
    patients = None if per_patient == 1 else np.arange(n) // per_patient
    for repeat in range(SIMULATIONS):
        target, score = simulated(rng, n, per_patient)
        result = score_with_intervals(
            "classify", target, score, ("a", "b"), patients, resamples=400, seed=repeat
        )
        for name in truth:
            low, high = result[name]["ci95"]
            inside[name] += low <= truth[name] <= high
    for name, count in inside.items():
        assert 0.93 <= count / SIMULATIONS <= 0.97, (name, count)
