"""From variables and a data set to predictions: the one place that opens the test split."""

import dataclasses
import io
import pathlib
from collections.abc import Sequence

import numpy as np

from medtl_jax.data.catalog import Dataset
from medtl_jax.errors import UserError
from medtl_jax.files import write_file
from medtl_jax.metrics.uncertainty import score_with_intervals
from medtl_jax.training.inference import Predict, probabilities


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What was predicted for one split.

    Attributes:
      ids: str `[n]`.
      target: int32 `[n]`.
      score: float32 `[n, classes]`, probabilities.
      images: uint8 `[n, h, w, c]`, for the report's examples.
      patients: str `[n]` or None.
    """

    ids: np.ndarray
    target: np.ndarray
    score: np.ndarray
    images: np.ndarray
    patients: np.ndarray | None = None


def predict_scores(predict: Predict, variables, images: np.ndarray) -> np.ndarray:
    """float32 probabilities `[n, classes]`. UserError if the network gives no finite numbers."""
    logits = predict(variables, images)
    if not np.isfinite(logits).all():
        raise UserError("the network's outputs are not finite; was the training stable?")
    return probabilities(logits).astype(np.float32)


def predict_splits(
    predict: Predict, variables, dataset: Dataset, names: Sequence[str]
) -> dict[str, Predictions]:
    """`{split: Predictions}` for the named splits, each example exactly once."""
    found = {}
    for name in names:
        split = dataset.splits[name]
        score = predict_scores(predict, variables, split.images)
        found[name] = Predictions(split.ids, split.labels, score, split.images, split.patients)
    return found


def score_splits(
    predictions: dict[str, Predictions], classes: Sequence[str], *, resamples: int, seed: int
) -> dict[str, dict]:
    """`{split: {metric: {"value", "ci95", "n"}}}`, the content of `metrics.json`."""
    return {
        name: score_with_intervals(
            found.target, found.score, classes, found.patients, resamples=resamples, seed=seed
        )
        for name, found in predictions.items()
    }


def write_predictions(path: pathlib.Path, predictions: dict[str, Predictions]) -> None:
    """Writes `<split>_id`, `<split>_target`, `<split>_score` to an .npz, whole or not at all."""
    arrays = {}
    for name, found in predictions.items():
        arrays |= {
            f"{name}_id": found.ids,
            f"{name}_target": found.target,
            f"{name}_score": found.score,
        }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_file(path, buffer.getvalue())
