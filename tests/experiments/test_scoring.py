"""What `metrics.json` holds: calibrated scores, operating points, and patients as one."""

import numpy as np
import pytest
from sklearn import metrics as sk

from experiments.reporting import score_splits
from medtl_jax.metrics.calibration import fit_calibration
from medtl_jax.metrics.temperature import apply_temperature
from medtl_jax.objectives.task import Task
from medtl_jax.report.predict import Predictions

CONFIG = {"eval": {"resamples": 30, "surface_tolerance": 2.0}, "seed": 0}
TASK = Task("classify", ("no", "yes"))


def predicted(seed: int, images: int = 4, patients: int = 40) -> Predictions:
    """Patients of as many images each, by a network that is far too sure."""
    rng = np.random.default_rng(seed)
    target = np.repeat(rng.integers(0, 2, patients), images)
    logit = 4 * (target - 0.5 + rng.normal(size=len(target)))
    positive = 1 / (1 + np.exp(-logit))
    return Predictions(
        ids=np.array([f"{i:03d}" for i in range(len(target))]),
        target=target,
        score=np.stack([1 - positive, positive], axis=1).astype(np.float32),
        images=np.zeros((len(target), 4, 4, 1), np.uint8),
        patients=np.repeat([f"p{i:02d}" for i in range(patients)], images),
    )


def fitted(val: Predictions):
    return fit_calibration("classify", val.target, val.score, TASK.classes, 0.9, val.patients)


def test_patients_are_scored_at_their_own_thresholds_and_calibrated():
    val, test = predicted(0), predicted(1)
    calibration = fitted(val)
    metrics, notes = score_splits(TASK, {"val": val, "test": test}, calibration, CONFIG, "val")
    assert set(metrics) == {"val", "val_patient", "test", "test_patient"} and not notes
    found = metrics["test_patient"]
    truth, means = test.target[::4], test.score.reshape(40, 4, 2).mean(axis=1)[:, 1]
    threshold = calibration.patient_thresholds["yes"]["youden"].value
    assert found["recall@youden"]["value"] == sk.recall_score(truth, means >= threshold)
    assert found["recall@youden"]["n"] == 40
    scaled = apply_temperature("classify", test.score, calibration.temperatures)
    scaled = scaled.reshape(40, 4, 2).mean(axis=1)[:, 1]
    brier = sk.brier_score_loss(truth, scaled)
    assert found["brier_calibrated"]["value"] == pytest.approx(brier, abs=1e-6)
    # Where they were fitted they say nothing.
    for split in ("val", "val_patient"):
        assert not any("@" in name or "calibrated" in name for name in metrics[split])


def test_a_val_split_of_other_data_is_scored_like_any_other():
    val, other = predicted(0), predicted(1)
    own, _ = score_splits(TASK, {"val": other}, fitted(val), CONFIG, "val")
    foreign, _ = score_splits(TASK, {"val": other}, fitted(val), CONFIG, "")
    brought = {name for name in foreign["val"] if "@" in name or "calibrated" in name}
    assert "recall@youden" in brought and "ece_calibrated" in brought
    assert not brought & set(own["val"]) and "brier_calibrated" in foreign["val_patient"]


def test_why_patients_have_no_thresholds_is_a_note():
    calibration = fitted(predicted(0, images=1))
    metrics, notes = score_splits(TASK, {"test": predicted(1)}, calibration, CONFIG, "val")
    assert notes == [
        "No operating points by patient: no patient has two validation images (split test)."
    ]
    assert "brier_calibrated" in metrics["test_patient"]
    assert not any("@" in name for name in metrics["test_patient"])
    assert "recall@youden" in metrics["test"]


def test_masks_have_calibrated_scores():
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, (6, 8, 8)).astype(np.uint8)
    positive = 1 / (1 + np.exp(-4 * (target - 0.5 + rng.normal(size=target.shape))))
    score = np.stack([1 - positive, positive], axis=-1).astype(np.float16)
    ids = np.array(list("abcdef"))
    found = Predictions(ids, target, score, np.zeros((6, 8, 8, 1), np.uint8))
    task = Task("segment", ("background", "lesion"))
    calibration = fit_calibration("segment", target, score, task.classes, 0.9)
    metrics, _ = score_splits(task, {"test": found}, calibration, CONFIG, "val")
    for name in ("ece", "brier", "nll"):
        before, after = metrics["test"][name], metrics["test"][f"{name}_calibrated"]
        assert after["value"] < before["value"] and after["n"] == 6
