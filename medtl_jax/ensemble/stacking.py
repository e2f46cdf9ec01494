"""Stacking (Wolpert 1992): a regularised linear model of the members' scores, fitted to labels.

- `classify`, `ordinal`: multinomial logistic regression on the members' log-probabilities, less
  their mean over the classes; of two classes, binary logistic regression on the log-odds;
- `multilabel`: for each finding, binary logistic regression on the members' log-odds;
- `regress`: for each number, ridge regression on the members' numbers.

What is minimised is the mean loss plus `penalty / 2 |W|^2`, with an intercept that is not
penalised and inputs in units of their standard deviation, one for all of them. The loss is the
NLL, or half the squared error in standard deviations. The penalty is the one of `PENALTIES` with
the lowest loss in cross-validation among the same images, whole patients together; of equal ones
the strongest.

What there are too few labels for is the members' mean: the probability of a class without an image
(the others share what it leaves), a finding that is always present or always absent, a number that
does not vary, labels of one patient alone. `Stack.note` names it.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy import special
from sklearn.linear_model import LogisticRegression, Ridge
from threadpoolctl import threadpool_limits

from medtl_jax.data.catalog import MISSING
from medtl_jax.data.strata import CLASS_TASKS
from medtl_jax.ensemble.combine import log_odds, log_probabilities
from medtl_jax.ensemble.folds import fold_numbers, units
from medtl_jax.metrics.classification import EPSILON

# The strongest first.
PENALTIES = tuple(10.0**exponent for exponent in range(1, -6, -1))
_FOLDS = 5


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear model of one question: outputs `inputs @ weights.T + bias`.

    Attributes:
      weights: float64 `[r, d]`.
      bias: float64 `[r]`.
      labels: the classes that it tells apart, r of them, or two with r = 1; empty for a number.
      penalty: the chosen one.
    """

    weights: np.ndarray
    bias: np.ndarray
    labels: tuple[int, ...]
    penalty: float

    def outputs(self, inputs: np.ndarray) -> np.ndarray:
        """Returns `[n, r]` of inputs `[n, d]`."""
        return inputs @ self.weights.T + self.bias

    def probabilities(self, inputs: np.ndarray) -> np.ndarray:
        """Returns the probabilities of `labels`, `[n, len(labels)]`, of inputs `[n, d]`."""
        logits = self.outputs(inputs)
        if logits.shape[1] == 1:
            logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
        return special.softmax(logits, axis=1)


@dataclasses.dataclass(frozen=True)
class Stack:
    """The fitted models of all questions of a task.

    Attributes:
      task: any but `segment`.
      models: one, or one a finding or number; None where there are too few labels.
      note: names these, and classes without an image; `""` if there are none.
    """

    task: str
    models: tuple[Linear | None, ...]
    note: str

    def apply(self, scores: np.ndarray) -> np.ndarray:
        """Returns the fused scores `[n, k]` of scores `[m, n, k]`, both float64."""
        if self.task in CLASS_TASKS:
            return _classes(self.models[0], _inputs(self.task, scores), scores.mean(axis=0))
        fused = scores.mean(axis=0)
        for j, model in enumerate(self.models):
            if model is not None:
                column = _inputs(self.task, scores[..., j])
                told = model.outputs if self.task == "regress" else model.probabilities
                fused[:, j] = told(column)[:, -1]
        return fused

    def to_json(self) -> list[dict | None]:
        """Returns the models as JSON values."""
        return [
            None
            if model is None
            else {
                "weights": model.weights.tolist(),
                "bias": model.bias.tolist(),
                "labels": list(model.labels),
                "penalty": model.penalty,
            }
            for model in self.models
        ]


# The problems are small: threads would wait for each other longer than they work.
@threadpool_limits.wrap(limits=1, user_api="blas")
def fit_stack(
    task: str,
    scores: np.ndarray,
    target: np.ndarray,
    seed: int = 0,
    patients: np.ndarray | None = None,
) -> Stack:
    """Returns the models for these images, the same for the same arguments.

    Args:
      task: any but `segment`.
      scores: float64 `[m, n, k]`.
      target: as in `catalog.Split`; unknown findings and numbers do not count.
      seed: of the folds of the cross-validation.
      patients: of each image `[n]`, None where they are not known.
    """
    if task in CLASS_TASKS:
        mean, inputs = scores.mean(axis=0), _inputs(task, scores)
        model = _fit(_fit_classes, _class_loss(mean), inputs, target, seed, patients)
        absent = sorted(set(range(scores.shape[-1])) - set(model.labels if model else ()))
        return Stack(task, (model,), _note("class", absent))
    models = []
    for j in range(scores.shape[-1]):
        rows = ~np.isnan(target[:, j]) if task == "regress" else target[:, j] != MISSING
        column, labels = scores[:, rows, j], target[rows, j]
        fit, loss = _fit_number, _squared_errors
        if task == "multilabel":
            present = column.mean(axis=0)
            fit, loss = _fit_classes, _class_loss(np.stack([1 - present, present], axis=1))
        known = None if patients is None else patients[rows]
        models.append(_fit(fit, loss, _inputs(task, column), labels, seed, known))
    without = [j for j, model in enumerate(models) if model is None]
    return Stack(task, tuple(models), _note("number" if task == "regress" else "finding", without))


def _note(noun: str, without: Sequence[int]) -> str:
    numbers = ", ".join(str(index) for index in without)
    return f"{noun} {numbers}: the members' mean, for too few labels" if numbers else ""


def _inputs(task: str, scores: np.ndarray) -> np.ndarray:
    """Inputs `[n, d]`: of classes from `[m, n, k]`, of one finding or number from `[m, n]`."""
    if task == "regress":
        return scores.T
    if task == "multilabel":
        return log_odds(scores).T
    if scores.shape[-1] == 2:
        return log_odds(scores[..., 1]).T
    logs = log_probabilities(scores)
    centred = logs - logs.mean(axis=-1, keepdims=True)
    return centred.transpose(1, 0, 2).reshape(scores.shape[1], -1)


def _fit(
    fit: Callable[[np.ndarray, np.ndarray, float], Linear | None],
    loss: Callable[[Linear | None, np.ndarray, np.ndarray, np.ndarray], float],
    inputs: np.ndarray,
    labels: np.ndarray,
    seed: int,
    patients: np.ndarray | None,
) -> Linear | None:
    """The model with the best penalty, None for labels that are all alike or of one patient.

    `fit` makes it of inputs, labels and a penalty; `loss` is the sum over the rows it is given
    (model, rows, their inputs, their labels).
    """
    if len(np.unique(labels)) < 2 or units(len(labels), patients) < 2:
        return None
    stratum = ["" if fit is _fit_number else str(label) for label in labels]
    part = fold_numbers(stratum, _FOLDS, seed, patients)

    def held_out(penalty: float) -> float:
        total = 0.0
        for number in range(part.max() + 1):
            rows, others = np.flatnonzero(part == number), part != number
            model = fit(inputs[others], labels[others], penalty)
            total += loss(model, rows, inputs[rows], labels[rows])
        return total

    return fit(inputs, labels, min(PENALTIES, key=held_out))


def _fit_classes(inputs: np.ndarray, labels: np.ndarray, penalty: float) -> Linear | None:
    """Logistic regression, None where all labels are the same."""
    present = np.unique(labels)
    if len(present) < 2:
        return None
    scale = _scale(inputs)
    strength = 1 / (penalty * len(labels))  # scikit-learn adds losses up
    model = LogisticRegression(C=strength, solver="newton-cg", tol=1e-6, max_iter=1000)
    model.fit(inputs / scale, labels)
    return Linear(model.coef_ / scale, model.intercept_, tuple(present.tolist()), penalty)


def _fit_number(inputs: np.ndarray, labels: np.ndarray, penalty: float) -> Linear:
    """Ridge regression."""
    labels = labels.astype(np.float64)
    scale, unit = _scale(inputs), labels.std() or 1.0
    model = Ridge(alpha=penalty * len(labels)).fit(inputs / scale, labels / unit)
    weights, bias = model.coef_[None] * unit / scale, np.array([model.intercept_ * unit])
    return Linear(weights, bias, (), penalty)


def _scale(inputs: np.ndarray) -> float:
    """One number for all inputs, so that none is penalised more than another."""
    return float(np.sqrt(inputs.var(axis=0).mean())) or 1.0


def _classes(model: Linear | None, inputs: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Probabilities `[n, k]`: those of classes that the model does not know are the `mean`'s."""
    if model is None:
        return mean
    fused = mean.copy()
    labels = list(model.labels)
    unknown = np.delete(mean, labels, axis=1).sum(axis=1, keepdims=True)
    fused[:, labels] = model.probabilities(inputs) * np.maximum(1 - unknown, 0)
    return fused


def _class_loss(mean: np.ndarray) -> Callable[..., float]:
    """NLL of rows of images whose members' mean probabilities are `mean` `[n, k]`."""

    def loss(model: Linear | None, rows: np.ndarray, inputs: np.ndarray, labels: np.ndarray):
        fused = _classes(model, inputs, mean[rows])
        of_truth = np.take_along_axis(fused, labels[:, None].astype(np.int64), axis=1)
        return float(-np.log(np.maximum(of_truth, EPSILON)).sum())

    return loss


def _squared_errors(
    model: Linear, rows: np.ndarray, inputs: np.ndarray, labels: np.ndarray
) -> float:
    del rows  # a number needs no mean to fall back on
    return float(((model.outputs(inputs)[:, 0] - labels) ** 2).sum())
