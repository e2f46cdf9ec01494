"""Writes medmnist_evaluator.npz: AUC and accuracy by the medmnist package, on drawn predictions.

Run once, in an environment with medmnist (3.0.2 made the stored file):

    python tests/golden/medmnist_evaluator.py
"""

import pathlib

import numpy as np
from medmnist.evaluator import getACC, getAUC

CASES = {
    "multi-class": (120, 5),
    "ordinal-regression": (80, 4),
    "binary-class": (90, 2),
    "multi-label, binary-class": (150, 6),
}


def drawn(task: str, n: int, k: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Targets as MedMNIST stores them and scores on a grid, so that many of them tie."""
    if task.startswith("multi-label"):
        return (rng.random((n, k)) < 0.3).astype(np.int64), rng.integers(0, 33, (n, k)) / 32
    score = rng.multinomial(32, np.full(k, 1 / k), size=n) / 32
    return rng.integers(0, k, (n, 1)), score


def main() -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for task, (n, k) in CASES.items():
        target, score = drawn(task, n, k, rng)
        arrays[f"{task}/target"] = target.astype(np.int8)
        arrays[f"{task}/score"] = score.astype(np.float32)
        arrays[f"{task}/auc_acc"] = np.array(
            [getAUC(target, score, task), getACC(target, score, task)]
        )
    np.savez_compressed(pathlib.Path(__file__).with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    main()
