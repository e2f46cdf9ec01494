"""Small made-up predictions of every task, as a run hands them to the report."""

import functools

import numpy as np

from medtl_jax.metrics.uncertainty import score_with_intervals
from medtl_jax.report.explanations import Explanations, choose_cases
from medtl_jax.report.figures import View

CLASSES = {
    "classify": ("no", "yes"),
    "ordinal": ("none", "mild", "severe"),
    "multilabel": ("mass", "nodule", "hernia"),
    "segment": ("background", "lesion", "vessel"),
    "regress": ("age", "area"),
}
SIDE = 16


def epochs(n=4):
    """Epoch records; the third is the one that was kept."""
    return [
        {
            "epoch": i + 1, "step": 10 * (i + 1), "train_loss": 1 / (i + 1), "val_loss": 0.9,
            "val_accuracy": 0.5 + 0.1 * i, "val_auc": None if i == 0 else 0.9,
            "val_mae": 4.0 - i, "lr_low": 1e-4, "lr_high": 1e-3, "gradient_norm_low": 1.5,
            "seconds": 1.5, "images_per_second": 90.0, "best": i in (0, 2),
        }
        for i in range(n)
    ]  # fmt: skip


def probabilities(n, k, seed=0):
    """Labels int `[n]` and probabilities `[n, k]` that know something of them."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, k, n)
    score = np.exp(rng.normal(size=(n, k)) + 2 * np.eye(k)[target])
    return target, score / score.sum(axis=1, keepdims=True)


def predictions(task, n=40, seed=0):
    """(target, score) of a task."""
    rng, k = np.random.default_rng(seed), len(CLASSES[task])
    if task in ("classify", "ordinal"):
        return probabilities(n, k, seed)
    if task == "multilabel":
        target = rng.integers(0, 2, (n, k)).astype(np.int8)
        score = np.clip(0.5 * target + 0.6 * rng.random((n, k)), 0, 1)
        target[:, 2] = 0
        target[:4, 0] = -1
        return target, score
    if task == "segment":
        target = np.zeros((n, SIDE, SIDE), np.uint8)
        target[:, 3:9, 3:9] = 1
        target[::2, 10:14, 10:14] = 2
        score = np.eye(k)[target] * 2 + rng.random((n, SIDE, SIDE, k)) * 3
        return target, (score / score.sum(axis=-1, keepdims=True)).astype(np.float16)
    target = rng.normal(50, 10, (n, k)).astype(np.float32)
    score = (target + rng.normal(0, 4, (n, k))).astype(np.float32)
    target[:5, 1] = np.nan
    return target, score


@functools.cache
def view(task):
    """Everything that the figures of a task may show."""
    target, score = predictions(task)
    classes = CLASSES[task]
    metrics = score_with_intervals(task, target, score, classes, resamples=20)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (len(target), SIDE, SIDE, 3), np.uint8)
    ids = np.array([f"folder/image_{i}.png" for i in range(len(target))])
    shown = {}
    if task != "segment":
        cases = choose_cases(task, target, score, classes)
        maps = rng.random((len(cases.rows), SIDE, SIDE)).astype(np.float32)
        correlation = np.linspace(-0.2, 0.4, len(cases.rows))
        shown["explanations"] = Explanations(
            cases, images[cases.rows], maps, maps[:, ::-1], correlation
        )
    return View(classes, target, score, images, ids, metrics, epochs(), **shown)
