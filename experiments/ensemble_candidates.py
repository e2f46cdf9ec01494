"""What may be used in the end: each member, each fusion of them, each soup; and its validation.

A fusion is fitted here, on the validation predictions alone; those of the test are only passed
through it afterwards.
"""

import dataclasses
import math
import pathlib
import reprlib
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.special

from experiments import trained
from experiments.compare import read_run
from experiments.ensemble_cells import MemberCell
from experiments.ladder_requests import read_notes, remade
from medtl_jax import runs
from medtl_jax.data.catalog import DataSpec
from medtl_jax.ensemble.fusion import (
    FUSIONS,
    Fusion,
    check_fusions,
    crossfit,
    fit_fusion,
    fusions_of,
)
from medtl_jax.errors import UserError
from medtl_jax.metrics.classification import EPSILON
from medtl_jax.metrics.pairing import Predicted, align
from medtl_jax.metrics.scores import task_scores
from medtl_jax.objectives.task import Task
from medtl_jax.report.ensemble import FUSION, MEMBER

# Folds of the cross-fitting.
_FOLDS = 5
# A weight below this is the rounding of a 0.
_LEAST = 1e-6


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to predict an image.

    Attributes:
      name: of its row.
      kind: `MEMBER`, `FUSION` or `SOUP`, of `report.ensemble`.
      val, test: what it predicts; of a fitted fusion each image of `val` by a fit without it.
      uses: how many networks an image passes through, by the label of the network.
      made_of: a member's run folder, or what a fusion or a soup consists of; JSON-ready.
    """

    name: str
    kind: str
    val: Predicted
    test: Predicted
    uses: Mapping[str, int]
    made_of: Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A fusion as it was fitted on all of validation, and `val`, its scores by cross-fitting."""

    fusion: Fusion
    val: np.ndarray


def names_of(config: dict, task: str, classes: int) -> list[str]:
    """The fusions that `config.ensemble.fusions` names, all that the task has where it is empty.

    UserError for one that there is not, or not for this task with so many classes.
    """
    text = config["ensemble"]["fusions"]
    if not text.strip():
        return list(fusions_of(task, classes))
    names = [part.strip() for part in text.split(",")]
    check_fusions(names, task, classes)
    return names


def read_members(cells: Sequence[MemberCell], folder: pathlib.Path) -> list[Candidate]:
    """The finished members in the study `folder`, their images in one order.

    UserError where one is damaged, or has other images or labels than the others.
    """
    val, test = (
        align([_read(cell, cell.folder(folder), split) for cell in cells])
        for split in ("val", "test")
    )
    return [
        Candidate(
            cell.title,
            MEMBER,
            *predicted,
            uses={cell.group: 1},
            made_of={"folder": str(cell.folder(folder).relative_to(folder))},
        )
        for cell, *predicted in zip(cells, val, test, strict=True)
    ]


def _read(cell: MemberCell, path: pathlib.Path, split: str) -> Predicted:
    with remade(path):
        return read_run(path, cell.title, split).predicted


def check_members(cells: Sequence[MemberCell], folder: pathlib.Path, spec: DataSpec) -> None:
    """UserError for a finished member whose files are damaged, or of another task or classes.

    Args:
      cells: all finished.
      folder: of the study.
      spec: of the images that all learned from.
    """
    for cell in cells:
        path = cell.folder(folder)
        with remade(path):
            task = trained.read_card(path).task
            read_notes(path)
            read = read_run(path, cell.title, "val").predicted
            for found in ((task.name, task.classes), (read.task, read.classes)):
                if found != (spec.task, tuple(spec.classes)):
                    raise UserError(
                        f"{path / runs.ENVIRONMENT} is of other images, of the task {found[0]} "
                        f"with {reprlib.repr(', '.join(found[1]))}: these are of {spec.task} with "
                        f"{reprlib.repr(', '.join(spec.classes))}"
                    )


def open_member(folder: pathlib.Path) -> trained.TrainedModel:
    """The best checkpoint of a finished member. UserError where it is damaged."""
    with remade(folder):
        return trained.open_run(folder)


def fit_fusions(names: Sequence[str], val: Sequence[Predicted], seed: int) -> dict[str, Fitted]:
    """Each fusion of `names`, fitted on what the members predict of the validation split.

    Args:
      names: of `fusion.FUSIONS`.
      val: of each member, aligned.
      seed: of the folds, which keep the images of a patient together.
    """
    first, scores = val[0], [one.score for one in val]
    given = first.task, scores, first.target
    options = {"seed": seed, "patients": first.patients}
    return {
        name: Fitted(
            fit_fusion(name, *given, **options), crossfit(name, *given, folds=_FOLDS, **options)
        )
        for name in names
    }


def fuse(fitted: Mapping[str, Fitted], members: Sequence[Candidate]) -> list[Candidate]:
    """The candidates of the fusions, whose test predictions are those of the members, fused."""
    val, test = members[0].val, members[0].test
    scores = [member.test.score for member in members]
    return [
        Candidate(
            name,
            FUSION,
            dataclasses.replace(val, name=name, score=found.val),
            dataclasses.replace(test, name=name, score=found.fusion.apply(scores)),
            uses=_uses(found.fusion, members),
            made_of=found.fusion.to_json(),
        )
        for name, found in fitted.items()
    ]


def _uses(fusion: Fusion, members: Sequence[Candidate]) -> dict[str, int]:
    """How many networks of each label the fusion needs; a weight of 0 needs none."""
    weights = np.ones(len(members)) if fusion.weights is None else fusion.weights
    used = [one for one, weight in zip(members, weights, strict=True) if weight > _LEAST]
    labels = [label for one in used for label in one.uses]
    return {label: labels.count(label) for label in dict.fromkeys(labels)}


def gives_probabilities(one: Candidate) -> bool:
    """Whether its scores are probabilities: ranks in a set, and numbers, are none."""
    ranks = one.kind == FUSION and FUSIONS[one.name].whole_set
    return not ranks and one.val.task != "regress"


def candidate_value(task: Task, select: str, one: Candidate) -> float | None:
    """As `validation_value`; ranks, which are no probabilities, have no loss."""
    if select == "loss" and task.name != "regress" and not gives_probabilities(one):
        return None
    return validation_value(task, select, one.val)


def validation_value(task: Task, select: str, predicted: Predicted) -> float | None:
    """What `train.select` is for these predictions of the validation split; None if undefined.

    The `loss` is that of `Task.val_loss`, worked out from the scores.
    """
    if select == "loss":
        judged = dataclasses.replace(task, name="classify") if task.name == "ordinal" else task
        value = judged.val_loss(_logits(task, predicted.score), predicted.target)
    else:
        given = task.name, predicted.target, predicted.score, task.classes
        value = task_scores(*given, surfaces=False)[select].value
    return value if math.isfinite(value) else None


def _logits(task: Task, score: np.ndarray) -> np.ndarray:
    """The outputs whose scores these are, float32; of ordered classes those of `classify`."""
    score = score.astype(np.float32)  # of masks it was float16
    if task.name == "regress":
        return (score - np.float32(task.mean)) / np.float32(task.std)
    if task.name == "multilabel":
        return scipy.special.logit(np.clip(score, EPSILON, 1 - EPSILON))
    return np.log(np.clip(score, EPSILON, None))
