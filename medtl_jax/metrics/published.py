"""The columns of the tables that papers on classification print, of r weighted samples at once.

Of two classes the second one is the positive one, and precision, recall, specificity, F1, Dice and
IoU are its own; of more they are means over the classes. Dice of a set of images that are called
positive and a set that are is 2TP / (2TP + FP + FN): it equals F1; IoU is TP / (TP + FP + FN). MAE
and MSE are of the probability of the positive class against the label, 0 or 1 (of more classes the
mean over them), so that MSE is the Brier score of two classes.
"""

import numpy as np

from medtl_jax.metrics.classification import Cases, weighted

TABLE_2 = ("accuracy", "precision", "recall", "specificity", "f1")
TABLE_3 = ("dice", "iou", "mae", "mse")


def published_scores(cases: Cases, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns each column, float64 `[r]`, NaN where undefined, of how often images count `[n, r]`.

    See the module's docstring. A mean over classes of which one is undefined is.
    """
    counts = counts.astype(np.float64)
    found = weighted(cases, counts)
    f1 = found["f1"]
    columns = {name: found[name] for name in TABLE_2}
    columns |= {"dice": f1, "iou": f1 / (2 - f1)}
    truth = np.eye(len(cases.classes))[cases.target]
    away = np.abs(np.asarray(cases.score) - truth)
    total = counts.sum(axis=0)
    columns |= {"mae": away.T @ counts / total, "mse": (away**2).T @ counts / total}
    return {name: _chosen(values, len(cases.classes)) for name, values in columns.items()}


def _chosen(values: np.ndarray, classes: int) -> np.ndarray:
    """Of values `[k, r]` that of the positive class, or the mean; `[1, r]` is of all classes."""
    return values[1] if classes == 2 and len(values) == 2 else values.mean(axis=0)
