"""Temperature scaling: fitted on the probabilities of one split, applied to those of another.

Temperature scaling (Guo et al. 2017) divides the logits by one number T > 0, the one with the
lowest negative log-likelihood (NLL) on validation. Dividing log-probabilities and normalising
again gives the same: logits are log-probabilities but for a constant. So the probabilities that
a run stores are enough. T > 1 takes confidence away, T < 1 adds some; the order of the classes of
an image stays.

- `classify`, `segment`: one T; `ordinal`: likewise, over the probabilities of its ranks;
- `multilabel`: a T for each finding, over the images whose label is known;
- `regress`: has no probabilities, and no T.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import optimize, special

from medtl_jax.data.catalog import MISSING, Array

# A temperature beyond these says that there is no minimum, not that the network is so far off.
LOWEST, HIGHEST = 0.05, 20.0
# One number is fitted: more pixels than this would not change it visibly.
MOST_PIXELS = 2**18


@dataclasses.dataclass(frozen=True)
class Temperature:
    """A temperature; where none could be fitted it is 1 (nothing changes) and `reason` says why."""

    value: float
    reason: str = ""


def fit_temperature(task: str, target: Array, score: Array) -> tuple[Temperature, ...]:
    """Returns the temperatures with the lowest NLL for these images: one, or one a finding.

    There is no such temperature, and it stays 1, where no label is known, all labels are the same,
    every label has the highest probability (then lower is always better), all probabilities are
    equal, or the minimum lies outside `LOWEST`..`HIGHEST`. Of `segment`, `MOST_PIXELS` pixels are
    looked at, as many of each image, always the same ones.

    Args:
      task: `classify`, `ordinal`, `multilabel` or `segment`.
      target: see `catalog.Split`.
      score: probabilities `[n, k]`, `segment`: `[n, h, w, k]`.

    Raises:
      ValueError: another task, or arrays that do not hold together.
    """
    _check(task, score)
    if tuple(target.shape) != tuple(score.shape if task == "multilabel" else score.shape[:-1]):
        raise ValueError(f"{task}: target {target.shape} does not fit score {score.shape}")
    if task == "segment":
        return (_fit(*_some_pixels(target, score)),)
    target, score = np.asarray(target), np.asarray(score)
    if task != "multilabel":
        return (_fit(target, _log_probability(score)),)
    known = target != MISSING
    return tuple(
        _fit(target[known[:, i], i], _log_odds(score[known[:, i], i]))
        for i in range(score.shape[1])
    )


def apply_temperature(task: str, score: Array, temperatures: Sequence[Temperature]) -> np.ndarray:
    """Returns the probabilities at these temperatures, in the shape and dtype of `score`.

    The most probable class of an image stays so, but for ties that rounding to the dtype makes.

    Args:
      task: `classify`, `ordinal`, `multilabel` or `segment`.
      score: probabilities `[n, k]`, `segment`: `[n, h, w, k]`.
      temperatures: of `fit_temperature`.

    Raises:
      ValueError: another task, or another number of temperatures.
    """
    _check(task, score)
    wanted = score.shape[1] if task == "multilabel" else 1
    if len(temperatures) != wanted:
        raise ValueError(f"{task}: want {wanted} temperatures, got {len(temperatures)}")
    result = np.empty(score.shape, score.dtype)
    if task == "multilabel":
        for i, temperature in enumerate(temperatures):
            column = np.asarray(score[:, i])
            unchanged = temperature.value == 1
            result[:, i] = column if unchanged else _scaled(_log_odds(column), temperature)[:, 1]
        return result
    # Image by image: all the pixels of a split as float64 might not fit into memory.
    step = 1 if task == "segment" else len(score)
    unchanged = temperatures[0].value == 1
    for start in range(0, len(score), step):
        rows = np.asarray(score[start : start + step])
        result[start : start + step] = (
            rows if unchanged else _scaled(_log_probability(rows), temperatures[0])
        )
    return result


@dataclasses.dataclass(frozen=True)
class ScaledMasks:
    """Probabilities `[n, h, w, k]` of a segmentation after scaling, made where they are read.

    A second array of all pixels beside `score` might not fit into memory. Rows are taken by a
    slice or an index array.

    Attributes:
      score: before scaling.
      temperatures: one.
    """

    score: Array
    temperatures: Sequence[Temperature]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.score.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.score.dtype

    def __len__(self) -> int:
        return len(self.score)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return apply_temperature("segment", np.asarray(self.score[rows]), self.temperatures)


def scaled(task: str, score: Array, temperatures: Sequence[Temperature]) -> Array:
    """Returns the probabilities at these temperatures, those of `segment` as `ScaledMasks`.

    Arguments and errors as of `apply_temperature`.
    """
    if task == "segment":
        _check(task, score)
        return ScaledMasks(score, tuple(temperatures))
    return apply_temperature(task, score, temperatures)


def _check(task: str, score: Array) -> None:
    if task not in ("classify", "ordinal", "multilabel", "segment"):
        raise ValueError(f"want a task with probabilities, got {task!r}")
    if len(score.shape) != (4 if task == "segment" else 2) or 0 in score.shape:
        raise ValueError(f"{task}: cannot scale a score of shape {score.shape}")


def _log_probability(score: np.ndarray) -> np.ndarray:
    """float64 logarithms of class probabilities, finite: a 0 is what its dtype rounds to 0."""
    floor = 2.0**-24 if score.dtype == np.float16 else 2.0**-126
    return np.log(np.maximum(score.astype(np.float64), floor))


def _log_odds(probability: np.ndarray) -> np.ndarray:
    """float64 `[n, 2]`: log-probabilities of absent and present, finite likewise."""
    present = probability.astype(np.float64)
    nearest = np.finfo(probability.dtype).epsneg / 2
    absent = np.log(np.maximum(1 - present, nearest))
    return np.stack([absent, _log_probability(probability)], axis=1)


def _scaled(logs: np.ndarray, temperature: Temperature) -> np.ndarray:
    return special.softmax(logs / temperature.value, axis=-1)


def _fit(target: np.ndarray, logs: np.ndarray) -> Temperature:
    """The temperature for labels `[n]` and log-probabilities `[n, k]`."""
    if not np.isfinite(logs).all():
        raise ValueError("scores hold NaN or infinity")
    if len(target) == 0:
        return Temperature(1.0, "no validation label is known")
    if target.min() < 0 or target.max() >= logs.shape[1]:
        raise ValueError(f"want labels in 0..{logs.shape[1] - 1}")
    if np.ptp(target) == 0:
        return Temperature(1.0, "all validation labels are the same")
    truth = np.take_along_axis(logs, target.astype(np.int64)[:, None], axis=1)
    if np.ptp(logs, axis=1).max() == 0:
        return Temperature(1.0, "all classes have the same probability on validation")
    if ((logs >= truth).sum(axis=1) == 1).all():
        return Temperature(1.0, "every validation label is told right: no temperature is best")

    def nll(log_temperature: float) -> float:
        beta = np.exp(-log_temperature)
        return float(np.mean(special.logsumexp(logs * beta, axis=1) - truth[:, 0] * beta))

    # Convex in 1 / T, so there is one minimum in log T too.
    bounds = (np.log(LOWEST), np.log(HIGHEST))
    found = optimize.minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-7})
    if min(found.x - bounds[0], bounds[1] - found.x) < 1e-3:
        return Temperature(1.0, f"the best temperature is not in {LOWEST:g}..{HIGHEST:g}")
    return Temperature(float(np.exp(found.x)) if found.fun < nll(0.0) else 1.0)


def _some_pixels(target: Array, score: Array) -> tuple[np.ndarray, np.ndarray]:
    """Labels `[m]` and log-probabilities `[m, k]` of as many pixels of each image."""
    rng = np.random.default_rng(0)
    pixels = target.shape[1] * target.shape[2]
    wanted = min(pixels, max(1, MOST_PIXELS // len(score)))
    labels, logs = [], []
    for i in range(len(score)):
        chosen = rng.choice(pixels, wanted, replace=False)
        labels.append(np.asarray(target[i]).ravel()[chosen])
        logs.append(_log_probability(np.asarray(score[i]).reshape(pixels, -1)[chosen]))
    return np.concatenate(labels), np.concatenate(logs)
