"""Fusion of the members' scores: rules by name, fitted on validation, applied to any split.

Scores are those of `report.predict.Predictions` with a leading member axis: an array `[m, n, ...]`,
or m arrays `[n, ...]`, which may be streamed. What comes back has the form of one member's. One
member alone is its own fusion, whatever the rule.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from medtl_jax.data.catalog import MISSING, TASKS, Array
from medtl_jax.data.strata import strata
from medtl_jax.ensemble.combine import logit_mean, rank_mean, vote, weighted_mean
from medtl_jax.ensemble.folds import fold_numbers, units
from medtl_jax.ensemble.masks import disputed_pixels, fuse_masks, pixel_likelihoods, staple
from medtl_jax.ensemble.stacking import Stack, fit_stack
from medtl_jax.ensemble.weighting import greedy_weights, least_squares_weights, likelihood_weights
from medtl_jax.errors import UserError
from medtl_jax.metrics.checks import check_labels, check_probabilities
from medtl_jax.metrics.classification import EPSILON

Scores = np.ndarray | Sequence[Array]

_LABELLED = ("classify", "multilabel", "ordinal", "segment")
# Of classes there must be two for it.
_RANK = "rank"


@dataclasses.dataclass(frozen=True)
class Rule:
    """A way of fusing members.

    Attributes:
      summary: one line.
      tasks: that have it, of `catalog.TASKS`.
      fitted: whether it learns from validation labels.
      whole_set: whether the score of an image depends on the others it is scored with.
    """

    summary: str
    tasks: tuple[str, ...]
    fitted: bool = False
    whole_set: bool = False


FUSIONS: Mapping[str, Rule] = MappingProxyType(
    {
        "mean": Rule("mean probability, or number", TASKS),
        "logit": Rule("mean logit: of classes the geometric mean", _LABELLED),
        "weighted": Rule("mean with the weights of the lowest validation loss", TASKS, fitted=True),
        "vote": Rule("share of votes, the mean probability decides a tie", _LABELLED),
        _RANK: Rule(
            "mean rank in the set, of findings or two classes; no probability",
            ("classify", "multilabel"),
            whole_set=True,
        ),
        "stacking": Rule(
            "regularised logistic or ridge regression on the members' scores",
            ("classify", "multilabel", "ordinal", "regress"),
            fitted=True,
        ),
        "greedy": Rule(
            "mean of members selected one by one, with replacement, for the validation loss",
            TASKS,
            fitted=True,
        ),
        "staple": Rule("STAPLE: votes weighted by each member's agreement", ("segment",)),
    }
)


@dataclasses.dataclass(frozen=True)
class Fusion:
    """A rule, and what was fitted for it.

    Attributes:
      name: of `FUSIONS`.
      task: of `catalog.TASKS`.
      shape: m members and k classes, findings or numbers.
      weights: float64 `[m]`, of a rule that has them; `[1.0]` of a single member.
      stack: of `stacking`.
    """

    name: str
    task: str
    shape: tuple[int, int]
    weights: np.ndarray | None = None
    stack: Stack | None = None

    @property
    def note(self) -> str:
        """What could not be fitted and is the members' mean instead, `""` if nothing."""
        return self.stack.note if self.stack else ""

    def apply(self, scores: Scores) -> np.ndarray:
        """Returns the fused scores `[n, ...]`, in the form and dtype of the first member's.

        Each image is fused by itself, but for rules with `whole_set`. Masks are read and fused
        one after another.

        Args:
          scores: `[m, n, ...]` of the members that the fusion was fitted for, in their order.

        Raises:
          UserError: masks of different sizes.
          ValueError: scores that are none, or of another number of members or classes.
        """
        shape = _check_members(self.task, scores)
        if shape != self.shape:
            raise ValueError(f"fitted for {self.shape} members and classes, got {shape}")
        return self.on_rows(scores, np.arange(len(scores[0])))

    def on_rows(self, scores: Scores, rows: np.ndarray) -> np.ndarray:
        """Returns the fused scores of the images of `rows`, int `[r]`; see `apply`."""
        if self.shape[0] == 1:
            return np.asarray(scores[0][rows])
        if self.task == "segment":
            return fuse_masks(scores, rows, self._combined)
        return self._combined(_read(self.task, scores, rows)).astype(scores[0].dtype)

    def _combined(self, scores: np.ndarray) -> np.ndarray:
        """Fused of float64 `[m, n, k]` or, of one mask, `[m, h, w, k]`."""
        if self.stack is not None:
            return self.stack.apply(scores)
        if self.weights is not None:
            return weighted_mean(scores, self.weights)
        if self.name == "mean":
            return scores.mean(axis=0)
        if self.name == "staple":
            return staple(scores.argmax(axis=-1), scores.shape[-1])
        return {"logit": logit_mean, "vote": vote, "rank": rank_mean}[self.name](self.task, scores)

    def to_json(self) -> dict:
        """Returns name, task, weights (or None), the note and the models of stacking as JSON."""
        found = {
            "name": self.name,
            "task": self.task,
            "fitted_on": "val" if FUSIONS[self.name].fitted else None,
            "weights": None if self.weights is None else self.weights.tolist(),
        }
        if self.stack is not None:
            found |= {"stacking": self.stack.to_json()}
        return found | ({"note": self.note} if self.note else {})


def fusions_of(task: str, classes: int) -> tuple[str, ...]:
    """Returns the names of the fusions that a task with so many classes has."""
    return tuple(
        name
        for name, rule in FUSIONS.items()
        if task in rule.tasks and _ranked(name, task, classes)
    )


def _ranked(name: str, task: str, classes: int | None) -> bool:
    """Whether the number of classes (None: not known) allows the rule."""
    return name != _RANK or task != "classify" or classes in (2, None)


def check_fusions(names: Sequence[str], task: str, classes: int | None = None) -> None:
    """Raises UserError unless `names` (`ensemble.fusions`) are fusions of the task, each once.

    Args:
      names: of `FUSIONS`.
      task: of `catalog.TASKS`.
      classes: how many there are, None while that is not known.
    """
    for place, name in enumerate(names):
        if name not in FUSIONS:
            raise UserError(
                f"ensemble.fusions: there is no fusion {name!r}; choose from {', '.join(FUSIONS)}"
            )
        if name in names[:place]:
            raise UserError(f"ensemble.fusions names {name!r} twice; leave one out")
        if task not in FUSIONS[name].tasks:
            raise UserError(
                f"ensemble.fusions: {name!r} is not for the task {task} (it is for "
                f"{', '.join(FUSIONS[name].tasks)}); leave it out"
            )
        if not _ranked(name, task, classes):
            raise UserError(
                f"ensemble.fusions: {name!r} is for two classes or for findings, and there are "
                f"{classes} classes; leave it out"
            )


def fit_fusion(
    name: str,
    task: str,
    scores: Scores,
    target: Array,
    *,
    seed: int = 0,
    patients: np.ndarray | None = None,
) -> Fusion:
    """Returns the fusion fitted to the validation images; of rules without a fit, just the rule.

    `weighted` has the weights of the lowest NLL of the weighted mean (`regress`: squared error,
    each number in its standard deviations), `greedy` those that `weighting.greedy_weights` selects
    for the same loss. Of masks, `weighted` looks at a sample of pixels
    (`masks.pixel_likelihoods`) and `greedy` at the Dice of all of them. `stacking` is that of
    `stacking.fit_stack`. Unknown findings and numbers do not count.

    Args:
      name: of `FUSIONS`.
      task: of `catalog.TASKS`.
      scores: `[m, n, ...]` on validation.
      target: as in `catalog.Split`, of the same images.
      seed: of what is drawn: pixels, folds.
      patients: of each image `[n]`, kept together in the folds of stacking; None where not known.

    Raises:
      UserError: as `check_fusions`; masks of different sizes; no label to fit to.
      ValueError: arrays that do not hold together.
    """
    shape = _check(name, task, scores, target, patients)
    return _fit(name, task, shape, scores, target, np.arange(len(target)), seed, patients)


def crossfit(
    name: str,
    task: str,
    scores: Scores,
    target: Array,
    *,
    folds: int = 5,
    seed: int = 0,
    patients: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the fused validation scores `[n, ...]`, each image by a fusion fitted without it.

    What was fitted to the images themselves would look better there than it is. The images are
    divided into `folds` parts (fewer where there are fewer images or patients), whole patients
    together, with an even share of the strata (`data.strata`) in each. Of a rule that is not
    fitted, and of a single member, it is what `apply` gives.

    Args:
      folds: 2 or more; the other arguments are those of `fit_fusion`.

    Raises:
      UserError: as `fit_fusion`; the images of one patient alone.
      ValueError: as `fit_fusion`; `folds` below 2.
    """
    shape = _check(name, task, scores, target, patients)
    if folds < 2:
        raise ValueError(f"want two folds or more, got {folds}")
    count = len(target)
    if not FUSIONS[name].fitted or shape[0] == 1:
        return Fusion(name, task, shape).on_rows(scores, np.arange(count))
    if units(count, patients) < 2:
        raise UserError(
            f"{name} is judged on validation images that it was not fitted to, and all are of one "
            "patient; leave it out of ensemble.fusions, or validate on more patients"
        )
    labels = None if task == "segment" else np.asarray(target)
    names = [str(j) for j in range(shape[1])]
    part = fold_numbers(strata(task, labels, names, count), folds, seed, patients)
    fused = np.empty(scores[0].shape, scores[0].dtype)
    for number in range(part.max() + 1):
        kept, held = np.flatnonzero(part != number), np.flatnonzero(part == number)
        fusion = _fit(name, task, shape, scores, target, kept, seed, patients)
        fused[held] = fusion.on_rows(scores, held)
    return fused


def _fit(
    name: str,
    task: str,
    shape: tuple[int, int],
    scores: Scores,
    target: Array,
    rows: np.ndarray,
    seed: int,
    patients: np.ndarray | None,
) -> Fusion:
    """The fusion fitted to the images of `rows` alone."""
    if shape[0] == 1:
        return Fusion(name, task, shape, np.ones(1))
    if not FUSIONS[name].fitted:
        return Fusion(name, task, shape)
    if name == "stacking":
        known = None if patients is None else np.asarray(patients)[rows]
        stack = fit_stack(task, _read(task, scores, rows), np.asarray(target)[rows], seed, known)
        return Fusion(name, task, shape, stack=stack)
    fit = _greedy if name == "greedy" else _weighted
    return Fusion(name, task, shape, fit(task, scores, target, rows, seed))


def _weighted(task: str, scores: Scores, target: Array, rows: np.ndarray, seed: int) -> np.ndarray:
    if task == "segment":
        return likelihood_weights(pixel_likelihoods(scores, target, rows, seed))
    if task == "regress":
        return least_squares_weights(*_known_numbers("weighted", scores, target, rows))
    return likelihood_weights(_likelihoods("weighted", task, scores, target, rows))


def _greedy(task: str, scores: Scores, target: Array, rows: np.ndarray, seed: int) -> np.ndarray:
    del seed  # nothing is drawn
    if task == "segment":
        disputed = disputed_pixels(scores, target, rows)
        return greedy_weights(len(scores), lambda weights: -disputed.dice(weights))
    if task == "regress":
        members, truth = _known_numbers("greedy", scores, target, rows)
        return greedy_weights(len(scores), lambda w: float(((members @ w - truth) ** 2).mean()))
    likelihood = _likelihoods("greedy", task, scores, target, rows)
    return greedy_weights(len(scores), lambda w: float(-np.log(likelihood @ w).mean()))


def _likelihoods(
    name: str, task: str, scores: Scores, target: Array, rows: np.ndarray
) -> np.ndarray:
    """What each member gives the truth, at least `EPSILON`, `[e, m]` of all known labels."""
    read, labels = _read(task, scores, rows), np.asarray(target)[rows].astype(np.int64)
    if task == "multilabel":
        known = labels != MISSING
        _check_known(name, known)
        found = np.where(labels == 1, read, 1 - read)[:, known]
    else:
        found = read[:, np.arange(len(rows)), labels]
    return np.maximum(found.T, EPSILON)


def _known_numbers(
    name: str, scores: Scores, target: Array, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions `[e, m]` and truth `[e]` of all known numbers, in standard deviations."""
    read, truth = _read("regress", scores, rows), np.asarray(target)[rows].astype(np.float64)
    known = ~np.isnan(truth)
    _check_known(name, known)
    count = np.maximum(known.sum(axis=0), 1)
    centre = np.where(known, truth, 0).sum(axis=0) / count
    spread = np.sqrt(np.where(known, (truth - centre) ** 2, 0).sum(axis=0) / count)
    spread[spread == 0] = 1
    return ((read - centre) / spread)[:, known].T, ((truth - centre) / spread)[known]


def _check_known(name: str, known: np.ndarray) -> None:
    if not known.any():
        raise UserError(
            f"{name} has nothing to be fitted to: no validation target is known; leave it out of "
            "ensemble.fusions"
        )


def _read(task: str, scores: Scores, rows: np.ndarray) -> np.ndarray:
    """The scores of the images of `rows`, float64 `[m, r, k]`, checked; not for masks."""
    read = np.stack([np.asarray(member[rows]) for member in scores]).astype(np.float64)
    if task != "regress":
        check_probabilities(read, sums_to_one=task != "multilabel")
    elif not np.isfinite(read).all():
        raise ValueError("scores hold NaN or infinity")
    return read


def _check(
    name: str, task: str, scores: Scores, target: Array, patients: np.ndarray | None
) -> tuple[int, int]:
    """Members and classes; raises as `fit_fusion`. Masks' labels are checked as they are read."""
    shape = _check_members(task, scores)
    check_fusions((name,), task, shape[1])
    one = tuple(scores[0].shape)
    if tuple(target.shape) != (one if task in ("multilabel", "regress") else one[:-1]):
        raise ValueError(f"{task}: target {target.shape} does not fit scores {one}")
    if patients is not None and len(patients) != len(target):
        raise ValueError(f"want a patient for each of {len(target)} images, got {len(patients)}")
    if task not in ("segment", "regress"):
        lowest, highest = (MISSING, 1) if task == "multilabel" else (0, shape[1] - 1)
        check_labels(np.asarray(target), lowest, highest)
    elif task == "regress" and np.isinf(np.asarray(target)).any():
        raise ValueError("targets hold infinity")
    return shape


def _check_members(task: str, scores: Scores) -> tuple[int, int]:
    """Members and classes. Raises UserError for members that differ in shape."""
    shapes = [tuple(member.shape) for member in scores]
    if not shapes or len(shapes[0]) != (4 if task == "segment" else 2) or 0 in shapes[0]:
        raise ValueError(f"{task}: want the scores of members and images, got shapes {shapes}")
    differing = [shape for shape in shapes if shape != shapes[0]]
    if differing:
        raise UserError(
            f"members with scores of shapes {shapes[0]} and {differing[0]} cannot be fused: let "
            "all of them predict the same images and classes, masks at one model.image_size"
        )
    return len(shapes), shapes[0][-1]
