"""Logistic regression, SVM and random forest on vectors, by scikit-learn, chosen on validation.

Every candidate of a small fixed grid is fitted to the training images; the one with the lowest
validation loss (mean negative log-likelihood, in nats) is kept, of equal ones the first. The test
split has no part in it.

- `logistic`: C of 1e-5 to 1, on standardised features.
- `svm`: RBF kernel, C of 0.3, 3, 30 and gamma of 0.3, 1, 3 over the number of features, on
  standardised features. Its decision values become probabilities by Platt's sigmoid (Platt 1999;
  one class against the others, normalised), which is fitted on the validation images: two numbers
  a class, so that the validation loss of an SVM is a little too good.
- `forest`: 300 trees, at least 1, 3 or 10 images in a leaf. One more vote, spread evenly over the
  classes, keeps every probability above 0.
"""

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from medtl_jax.errors import UserError
from medtl_jax.objectives.task import Task
from medtl_jax.transfer.vectors import check_vectors

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
COSTS, WIDTHS = (0.3, 3.0, 30.0), (0.3, 1.0, 3.0)
LEAVES = (1, 3, 10)
TREES = 300
# The similarities of all pairs of so many images are 1.2 GB.
MOST_OF_SVM = 12_000
_ITERATIONS = 500
_ROWS = 1024
_LEAST = 1e-12

# Vectors float32 `[n, d]` -> probabilities float64 `[n, k]`.
Probabilities = Callable[[np.ndarray], np.ndarray]
Candidate = tuple[dict[str, float], Probabilities]


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """What was fitted and chosen.

    Attributes:
      kind: of `KINDS`.
      chosen: the hyper-parameters, by scikit-learn's names.
      path: `(hyper-parameters, validation loss)` of each candidate.
      unfinished: how many candidates had not converged.
      probabilities: of vectors.
    """

    kind: str
    chosen: Mapping[str, float]
    path: tuple[tuple[Mapping[str, float], float], ...]
    unfinished: int
    probabilities: Probabilities

    @property
    def loss(self) -> float:
        """The validation loss of the chosen one."""
        return min(loss for _, loss in self.path)

    def score(self, vectors: np.ndarray) -> np.ndarray:
        """float32 `[n, k]` of vectors `[n, d]`, as `Task.score` has it."""
        blocks = (vectors[start : start + _ROWS] for start in range(0, len(vectors), _ROWS))
        return np.concatenate([self.probabilities(block) for block in blocks]).astype(np.float32)


def fit_classifier(
    kind: str,
    task: Task,
    vectors: np.ndarray,
    target: np.ndarray,
    val_vectors: np.ndarray,
    val_target: np.ndarray,
    *,
    seed: int = 0,
    advance: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> Classifier:
    """The classifier whose hyper-parameters have the lowest validation loss.

    Args:
      kind: of `KINDS`.
      task: `classify`.
      vectors, val_vectors: float32 `[n, d]`, may be memory-mapped.
      target, val_target: int `[n]`, class indices.
      seed: of the forest's draws.
      advance: called after each candidate.

    Raises:
      UserError: another task; more training images than an SVM holds; as `vectors.check_vectors`.
    """
    if task.name != "classify":
        raise UserError(
            f"a {kind} classifier on traditional features predicts one label an image (classify), "
            f"not {task.name}; use experiment=finetune"
        )
    if kind == "svm" and len(vectors) > MOST_OF_SVM:
        raise UserError(
            f"traditional.classifier=svm compares all pairs of training images: at most "
            f"{MOST_OF_SVM}, there are {len(vectors)}; lower data.train_fraction or take logistic "
            "or forest"
        )
    check_vectors(task, vectors, target, val_vectors, val_target)
    target, val_target = (np.asarray(values).astype(np.intp) for values in (target, val_target))
    val_vectors, best, path, unfinished = np.asarray(val_vectors), None, [], 0
    fit, total = KINDS[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        data = (np.asarray(vectors), target, val_vectors, val_target)
        for done, (setting, found) in enumerate(fit(len(task.classes), *data, seed), 1):
            loss = _loss(found(val_vectors), val_target)
            if best is None or loss < min(earlier for _, earlier in path):
                best = (setting, found)
            path.append((setting, loss))
            advance(done, total, "")
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            unfinished += 1
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return Classifier(kind, best[0], tuple(path), unfinished, best[1])


def _loss(probability: np.ndarray, target: np.ndarray) -> float:
    """Mean negative log-likelihood in nats; a probability of 0 counts as 1e-12."""
    right = probability[np.arange(len(target)), target]
    return float(-np.log(np.maximum(right, _LEAST)).mean())


def _fit_logistic(classes, vectors, target, val_vectors, val_target, seed) -> Iterator[Candidate]:
    scaler = StandardScaler().fit(vectors)
    standard = scaler.transform(vectors)
    for penalty in PENALTIES:
        model = LogisticRegression(C=penalty, max_iter=_ITERATIONS).fit(standard, target)

        def found(rows, model=model):
            return _of_all(model, model.predict_proba(scaler.transform(rows)), classes)

        yield {"C": penalty}, found


def _fit_forest(classes, vectors, target, val_vectors, val_target, seed) -> Iterator[Candidate]:
    for leaf in LEAVES:
        model = RandomForestClassifier(
            TREES, min_samples_leaf=leaf, random_state=seed, n_jobs=-1
        ).fit(vectors, target)

        def found(rows, model=model):
            share = _of_all(model, model.predict_proba(rows), classes)
            return (share * TREES + 1 / classes) / (TREES + 1)

        yield {"min_samples_leaf": leaf}, found


def _fit_svm(classes, vectors, target, val_vectors, val_target, seed) -> Iterator[Candidate]:
    scaler = StandardScaler().fit(vectors)
    standard = scaler.transform(vectors)
    squares = euclidean_distances(standard, squared=True)
    val_squares = euclidean_distances(scaler.transform(val_vectors), standard, squared=True)
    for width in WIDTHS:
        gamma = width / standard.shape[1]
        kernel, val_kernel = (np.exp(-gamma * values) for values in (squares, val_squares))
        for cost in COSTS:
            model = SVC(C=cost, kernel="precomputed", cache_size=500).fit(kernel, target)
            platt = _fit_platt(_decisions(model, val_kernel), val_target, model.classes_)

            def found(rows, model=model, platt=platt, gamma=gamma):
                away = euclidean_distances(scaler.transform(rows), standard, squared=True)
                share = platt(_decisions(model, np.exp(-gamma * away)))
                return _of_all(model, share, classes)

            yield {"C": cost, "gamma": gamma}, found


def _decisions(model: SVC, kernel: np.ndarray) -> np.ndarray:
    """float64 `[n, m]`: how far each of the m classes is ahead of the others."""
    values = model.decision_function(kernel)
    return np.stack([-values, values], axis=1) if values.ndim == 1 else values


def _fit_platt(decisions: np.ndarray, target: np.ndarray, present: np.ndarray) -> Probabilities:
    """Platt's sigmoid of each class, fitted to decision values `[n, m]` of the classes `present`.

    The targets are those of Platt 1999, which keep a class apart from 0 and 1 that is easily told,
    or not there at all.
    """
    models = []
    for column, label in zip(decisions.T, present, strict=True):
        positive = target == label
        most = (positive.sum() + 1) / (positive.sum() + 2)
        least = 1 / ((~positive).sum() + 2)
        weight = np.where(positive, most, least)
        model = LogisticRegression(C=1e6, max_iter=_ITERATIONS)
        models.append(
            model.fit(
                np.concatenate([column, column])[:, None],
                np.repeat([1, 0], len(column)),
                sample_weight=np.concatenate([weight, 1 - weight]),
            )
        )

    def found(decisions):
        columns = zip(models, decisions.T, strict=True)
        share = np.stack([m.predict_proba(c[:, None])[:, 1] for m, c in columns], axis=1)
        return share / share.sum(axis=1, keepdims=True)

    return found


def _of_all(model, share: np.ndarray, classes: int) -> np.ndarray:
    """float64 `[n, classes]`: with 0 for the classes that no training image has."""
    found = np.zeros((len(share), classes))
    found[:, model.classes_] = share
    return found


# The candidates of each, and how many there are.
KINDS: dict[str, tuple[Any, int]] = {
    "logistic": (_fit_logistic, len(PENALTIES)),
    "svm": (_fit_svm, len(list(itertools.product(COSTS, WIDTHS)))),
    "forest": (_fit_forest, len(LEAVES)),
}
