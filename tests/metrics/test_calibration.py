import copy
import dataclasses
import json

import numpy as np
import pytest
from scipy import special
from sklearn.calibration import calibration_curve

from medtl_jax.errors import UserError
from medtl_jax.metrics import segmentation
from medtl_jax.metrics.calibration import (
    Calibration,
    calibration_scores,
    fit_calibration,
    from_json,
    pixel_reliability,
    reliability,
    to_json,
)
from medtl_jax.metrics.temperature import Temperature, apply_temperature
from medtl_jax.metrics.thresholds import Threshold
from medtl_jax.metrics.uncertainty import score_with_intervals

FINDINGS = ("nodule", "hernia", "mass")


def multiclass(n, k, seed, factor=3.0):
    """Labels drawn from softmax(z), and the scores of a network whose logits are `factor` z."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, k))
    target = np.array([rng.choice(k, p=p) for p in special.softmax(z, axis=1)])
    return target, special.softmax(factor * z, axis=1).astype(np.float32)


def findings(n, seed, factor=3.0):
    """As above for three findings; some labels are missing, the second finding is never present."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 3))
    target = (rng.random((n, 3)) < special.expit(z)).astype(np.int8)
    target[:, 1] = 0
    target[rng.random((n, 3)) < 0.1] = -1
    return target, special.expit(factor * z).astype(np.float32)


def test_fit_of_each_task():
    target, score = multiclass(300, 3, 0)
    found = fit_calibration("classify", target, score, ("a", "b", "c"), 0.9)
    assert len(found.temperatures) == 1 and set(found.thresholds) == {"a", "b", "c"}
    found = fit_calibration("ordinal", target, score, ("a", "b", "c"), 0.9)
    assert len(found.temperatures) == 1 and set(found.thresholds) == {">=b", ">=c"}
    found = fit_calibration("multilabel", *findings(300, 1), FINDINGS, 0.9)
    assert len(found.temperatures) == 3 and tuple(found.thresholds) == FINDINGS
    assert found.temperatures[1].reason and found.thresholds["hernia"]["youden"].reason
    masks, shape = target[:288].reshape(2, 12, 12).astype(np.uint8), (2, 12, 12, 3)
    found = fit_calibration("segment", masks, score[:288].reshape(shape), ("a", "b", "c"), 0.9)
    assert len(found.temperatures) == 1 and found.thresholds == {}
    numbers = np.zeros((4, 1), np.float32)
    assert fit_calibration("regress", numbers, numbers, ("age",), 0.9) == Calibration(0.9, (), {})
    with pytest.raises(UserError, match=r"eval\.target_sensitivity=2"):
        fit_calibration("regress", numbers, numbers, ("age",), 2)


def test_scores_of_an_overconfident_network_improve_where_they_were_not_fitted():
    classes = ("a", "b", "c")
    fitted = fit_calibration("classify", *multiclass(800, 3, 0), classes, 0.9).temperatures
    target, score = multiclass(400, 3, 1)
    patients = np.arange(400) // 2
    settings = {"resamples": 100, "seed": 3}
    before = score_with_intervals("classify", target, score, classes, patients, **settings)
    after = calibration_scores("classify", target, score, classes, fitted, patients, **settings)
    assert set(after) == {"ece_calibrated", "brier_calibrated", "nll_calibrated"}
    for name, entry in after.items():
        assert entry["value"] < before[name.removesuffix("_calibrated")]["value"]
        low, high = entry["ci95"]
        assert low <= entry["value"] <= high or name == "ece_calibrated"
        assert entry["n"] == 400 and entry["n_patients"] == 200 and "reason" not in entry
    scaled = apply_temperature("classify", score, fitted).astype(np.float64)
    own = -np.log(scaled[np.arange(400), target]).mean()
    assert after["nll_calibrated"]["value"] == pytest.approx(own, abs=1e-6)
    truth = np.eye(3)[target]
    own = ((scaled - truth) ** 2).sum(axis=1).mean()  # three classes: over all of them
    assert after["brier_calibrated"]["value"] == pytest.approx(own, abs=1e-6)
    json.dumps(after, allow_nan=False)


def test_a_finding_without_a_temperature_is_named_with_its_scores():
    fitted = fit_calibration("multilabel", *findings(300, 0), FINDINGS, 0.9).temperatures
    after = calibration_scores("multilabel", *findings(200, 1), FINDINGS, fitted, resamples=50)
    raw = score_with_intervals("multilabel", *findings(200, 1), FINDINGS, resamples=50)
    assert set(after) == {
        f"{metric}_calibrated{name}"
        for metric in ("ece", "brier", "nll")
        for name in ("", *(f"/{finding}" for finding in FINDINGS))
        if f"{metric}{name}" in raw
    }
    line = "temperature of hernia kept at 1: all validation labels are the same"
    assert after["ece_calibrated/hernia"]["value"] == raw["ece/hernia"]["value"]
    assert line in after["ece_calibrated/hernia"]["reason"]
    assert line in after["ece_calibrated"]["reason"]
    assert "reason" not in after["ece_calibrated/mass"]
    assert after["ece_calibrated/mass"]["value"] < raw["ece/mass"]["value"]


def test_why_the_only_temperature_is_one_stands_beside_the_scores():
    target, score = multiclass(60, 2, 0)
    after = calibration_scores(
        "classify", target, score, ("a", "b"), (Temperature(1.0, "too few"),), resamples=20
    )
    assert {entry["reason"] for entry in after.values()} == {"temperature kept at 1: too few"}


def test_numbers_have_no_calibrated_scores():
    assert calibration_scores("regress", np.zeros(1), np.zeros((1, 1)), ("a",), ()) == {}


class Counted:
    """An array that tells how many rows were taken at a time."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.most = array, array.shape, array.dtype, 0

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        taken = self.array[rows]
        self.most = max(self.most, len(taken))
        return taken


def test_masks_are_scaled_and_scored_a_few_at_a_time():
    target, score = multiclass(30 * 8 * 8, 3, 4)
    target, score = target.reshape(30, 8, 8).astype(np.uint8), score.reshape(30, 8, 8, 3)
    streamed, temperatures = Counted(score), (Temperature(3.0),)
    after = calibration_scores(
        "segment", target, streamed, ("a", "b", "c"), temperatures, resamples=50
    )
    assert set(after) == {"ece_calibrated", "brier_calibrated", "nll_calibrated"}
    assert streamed.most <= 8, "no second copy of all pixels"
    # Each pixel as an image of its own, scaled at once.
    flat = apply_temperature("classify", score.reshape(-1, 3), temperatures)
    want = score_with_intervals("classify", target.ravel(), flat, ("a", "b", "c"), resamples=2)
    for name, entry in after.items():
        assert entry["value"] == pytest.approx(want[name.removesuffix("_calibrated")]["value"])
        assert entry["n"] == 30 and entry["ci95"][0] < entry["value"] < entry["ci95"][1]
    cases = segmentation.prepare(target, score, ("a", "b", "c"), surfaces=False)
    pixels, images = pixel_reliability(cases), reliability(target.ravel(), score.reshape(-1, 3))
    np.testing.assert_array_equal(pixels.count, images.count)
    np.testing.assert_allclose(pixels.confidence, images.confidence, atol=1e-6)
    np.testing.assert_allclose(pixels.accuracy, images.accuracy, atol=1e-12)


def test_patients_are_scored_by_the_mean_of_their_scaled_images():
    patients = np.repeat(np.arange(60), 3)
    target, score = multiclass(180, 2, 2)
    target, temperatures = np.repeat(target[::3], 3), (Temperature(2.5),)
    given = ("classify", target, score, ("a", "b"), temperatures, patients)
    found = calibration_scores(*given, merge=True, resamples=50)
    means = apply_temperature("classify", score, temperatures).reshape(60, 3, 2).mean(axis=1)
    brier = ((means[:, 1] - target[::3]) ** 2).mean()
    assert found["brier_calibrated"]["value"] == pytest.approx(brier, abs=1e-6)
    assert found["brier_calibrated"]["n"] == 60
    with pytest.raises(ValueError, match="patients cannot be scored as one: 1 of 60"):
        calibration_scores("classify", np.r_[1 - target[:1], target[1:]], *given[2:], merge=True)


def test_thresholds_for_patients_are_fitted_on_their_means():
    patients = np.repeat(np.arange(50), 4)
    target, score = multiclass(200, 2, 2)
    target = np.repeat(target[::4], 4)
    found = fit_calibration("classify", target, score, ("a", "b"), 0.9, patients)
    means = score.reshape(50, 4, 2).mean(axis=1)
    alone = fit_calibration("classify", target[::4], means, ("a", "b"), 0.9)
    assert found.patient_thresholds.keys() == alone.thresholds.keys() == {"b"}
    for point in ("youden", "sensitivity"):
        value = found.patient_thresholds["b"][point].value
        assert value == pytest.approx(alone.thresholds["b"][point].value, abs=1e-6)
        assert value != found.thresholds["b"][point].value
    assert found.without_patients == ""
    assert alone.patient_thresholds == {}
    assert alone.without_patients == "the validation images name no patient"
    single = fit_calibration("classify", target, score, ("a", "b"), 0.9, np.arange(200))
    assert single.without_patients == "no patient has two validation images"
    target[0] = 1 - target[0]
    mixed = fit_calibration("classify", target, score, ("a", "b"), 0.9, patients)
    assert mixed.without_patients == "1 of 50 patients have images of more than one class"
    assert mixed.patient_thresholds == {} and mixed.thresholds


def test_reliability_equals_scikit_learn():
    target, score = findings(500, 2)
    found = reliability(target[:, 0], score[:, 0])
    known = target[:, 0] >= 0
    frequency, mean = calibration_curve(target[known, 0], score[known, 0], n_bins=15)
    kept = found.count > 0
    np.testing.assert_allclose(found.accuracy[kept], frequency, atol=1e-12)
    np.testing.assert_allclose(found.confidence[kept], mean, atol=1e-7)
    assert found.count.sum() == known.sum() and found.count.shape == (15,)
    assert np.isnan(found.accuracy[~kept]).all() and np.isnan(found.confidence[~kept]).all()


def test_reliability_of_the_predicted_class_by_hand():
    score = np.array([[0.9, 0.1], [0.07, 0.93], [0.6, 0.4], [0.0, 1.0]])
    found = reliability(np.array([0, 0, 1, 1]), score)
    # 0.9 is in (13/15, 14/15] together with 0.93; 0.6 closes (8/15, 9/15]; 1 closes the last.
    assert found.count.tolist() == [0] * 8 + [1, 0, 0, 0, 0, 2, 1]
    assert found.confidence[8] == 0.6 and found.accuracy[8] == 0
    assert found.confidence[13] == pytest.approx(0.915) and found.accuracy[13] == 0.5
    assert found.confidence[14] == 1 and found.accuracy[14] == 1


def test_reliability_gaps_add_up_to_the_calibration_error():
    target, score = multiclass(300, 3, 5)
    found = reliability(target, score)
    gap = np.nansum(found.count * np.abs(found.accuracy - found.confidence)) / 300
    entries = score_with_intervals("classify", target, score, ("a", "b", "c"), resamples=10)
    assert gap == pytest.approx(entries["ece"]["value"], abs=1e-9)


def test_reliability_of_arrays_that_do_not_hold_together():
    with pytest.raises(ValueError, match="want target"):
        reliability(np.zeros(2, int), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="want target"):
        reliability(np.zeros((2, 2), int), np.zeros((2, 2)))


CASES = {
    "classify": (*multiclass(50, 2, 0), ("a", "b")),
    "ordinal": (*multiclass(50, 3, 0), ("a", "b", "c")),
    "multilabel": (*findings(50, 0), FINDINGS),
    "regress": (np.zeros((4, 1), np.float32), np.zeros((4, 1), np.float32), ("age",)),
}


@pytest.mark.parametrize("task", CASES)
def test_a_written_calibration_reads_back_as_it_was(task):
    target, score, classes = CASES[task]
    found = fit_calibration(task, target, score, classes, 0.9)
    by_patient = np.arange(len(target)) // 2
    if task in ("classify", "ordinal"):
        target = np.repeat(target[::2], 2)
    for known in (found, fit_calibration(task, target, score, classes, 0.9, by_patient)):
        assert (known is found) or bool(known.patient_thresholds) == (task != "regress")
        text = json.dumps(to_json(task, known, classes), allow_nan=False)
        assert from_json(task, json.loads(text), classes, "calibration.json") == known


def test_the_file_by_hand():
    found = Calibration(
        0.95,
        (Temperature(1.5), Temperature(1.0, "no label")),
        {
            "x": {"youden": Threshold(0.25), "sensitivity": Threshold(0.125)},
            "y": {"youden": Threshold(None, "none"), "sensitivity": Threshold(0.5)},
        },
        {
            "x": {"youden": Threshold(0.375), "sensitivity": Threshold(0.25)},
            "y": {"youden": Threshold(None, "no one"), "sensitivity": Threshold(0.5)},
        },
    )
    assert to_json("multilabel", found, ("x", "y")) == {
        "fitted_on": "val",
        "target_sensitivity": 0.95,
        "temperature": [1.5, 1.0],
        "thresholds": {
            "x": {"youden": 0.25, "sensitivity": 0.125},
            "y": {"youden": None, "sensitivity": 0.5},
        },
        "patient_thresholds": {
            "x": {"youden": 0.375, "sensitivity": 0.25},
            "y": {"youden": None, "sensitivity": 0.5},
        },
        "reasons": {
            "temperature/y": "no label",
            "youden/y": "none",
            "patient/youden/y": "no one",
        },
    }
    without = dataclasses.replace(found, patient_thresholds={}, without_patients="unknown")
    card = to_json("multilabel", without, ("x", "y"))
    assert card["patient_thresholds"] == {}
    assert card["reasons"]["patient_thresholds"] == "unknown"


def broken(path, value):
    """The file of a multi-label run with the entry at `path` replaced."""
    found = fit_calibration("multilabel", *findings(50, 0), FINDINGS, 0.9)
    content = copy.deepcopy(to_json("multilabel", found, FINDINGS))
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "want the keys"),
        ({}, "want the keys"),
        (broken(["more"], 1), "want the keys"),
        (broken(["fitted_on"], "test"), "fitted_on to be 'val'"),
        (broken(["fitted_on"], ["val"]), "fitted_on to be 'val'"),
        (broken(["target_sensitivity"], 0), "0 < s <= 1"),
        (broken(["target_sensitivity"], "0.9"), "0 < s <= 1"),
        (broken(["target_sensitivity"], True), "0 < s <= 1"),
        (broken(["temperature"], [1.0]), "has 3 temperatures"),
        (broken(["temperature"], {"0": 1}), "has 3 temperatures"),
        (broken(["temperature", 0], float("nan")), "numbers in 0.05..20"),
        (broken(["temperature", 0], float("inf")), "numbers in 0.05..20"),
        (broken(["temperature", 0], 10**400), "numbers in 0.05..20"),
        (broken(["temperature", 0], 0), "numbers in 0.05..20"),
        (broken(["temperature", 1], 2.0), "must be 1"),
        (broken(["thresholds"], None), "not those of the run's classes"),
        (broken(["thresholds", "other"], {}), "not those of the run's classes"),
        (broken(["thresholds", "mass"], {"youden": 0.5}), "youden and sensitivity"),
        (broken(["thresholds", "mass"], 0.5), "youden and sensitivity"),
        (broken(["thresholds", "mass", "youden"], -0.1), "probabilities or null"),
        (broken(["thresholds", "mass", "youden"], float("nan")), "probabilities or null"),
        (broken(["thresholds", "mass", "youden"], None), "a reason for each"),
        (broken(["thresholds", "hernia", "youden"], 0.5), "a reason for each"),
        (broken(["patient_thresholds"], {"other": {}}), "not those of the run's classes"),
        (broken(["patient_thresholds"], 7), "not those of the run's classes"),
        (broken(["reasons"], {}), "a reason for each threshold"),
        (broken(["reasons"], []), "must be texts"),
        (broken(["reasons", "youden/hernia"], ""), "must be texts"),
        (broken(["reasons", "youden/hernia"], "x" * 501), "must be texts"),
        (broken(["reasons", "youden/hernia"], "\ud800"), "must be texts"),
        (broken(["reasons", "youden/nobody"], "x"), "reasons name 1 things"),
    ],
)
def test_a_file_that_a_run_did_not_write_is_refused_in_one_line(content, words):
    with pytest.raises(UserError) as caught:
        from_json("multilabel", content, FINDINGS, "run/calibration.json")
    message = str(caught.value)
    assert message.startswith("run/calibration.json: ") and words in message
    assert "\n" not in message


def test_a_file_without_thresholds_for_patients_must_say_why():
    target, score = findings(50, 0)
    patients = np.arange(50) // 2
    for known in (None, patients):
        found = fit_calibration("multilabel", target, score, FINDINGS, 0.9, known)
        content = to_json("multilabel", found, FINDINGS)
        if known is None:
            del content["reasons"]["patient_thresholds"]
        else:
            content["reasons"]["patient_thresholds"] = "there are some"
        with pytest.raises(UserError, match="want thresholds for patients, or a reason why"):
            from_json("multilabel", content, FINDINGS, "calibration.json")
