"""Figures of single labels and findings: confusion matrix, confident examples, worst errors."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import rankdata

from medtl_jax.data.catalog import MISSING, Array
from medtl_jax.report.style import image_grid, new_figure, short_labels, styled

# Above this many classes the cells are too small for numbers.
MOST_ANNOTATED = 14
MOST_EXAMPLES = 6


@styled
def confusion_figure(confusion: np.ndarray, classes: Sequence[str], unit: str = "image") -> Figure:
    """Returns the confusion matrix as a heat map: counts, and percentages of each row.

    Args:
      confusion: int `[k, k]`, rows are the truth.
      classes: k class names.
      unit: what is counted, singular.
    """
    k = len(classes)
    total = confusion.sum(axis=1, keepdims=True)
    share = np.divide(confusion, total, out=np.zeros(confusion.shape), where=total > 0)
    side = min(10.0, max(4.0, 0.62 * k + 1.6))
    caption = f"Confusion matrix: {unit}s, and the share of each true class."
    figure = new_figure(0.9 * side, caption, side + 0.6)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.grid(False)
    names = short_labels(classes, 18)
    # A name may be as high as two thirds of its row, in points.
    size = min(9.0, max(3.0, 0.66 * 0.7 * side * 72 / k))
    upright = k <= 3 and max(map(len, names)) <= 12
    turned = {} if upright else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(k), names, fontsize=size, **turned)
    axes.set_yticks(range(k), names, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    if k <= MOST_ANNOTATED:
        for row, column in np.ndindex(k, k):
            percent = f"{share[row, column]:.1%}" if total[row, 0] else f"no {unit}"
            axes.text(
                column,
                row,
                f"{_count(confusion[row, column])}\n{percent}",
                ha="center",
                va="center",
                fontsize=10 if k <= 4 else 8,
                color="white" if share[row, column] > 0.55 else "black",
            )
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=30, label="share of the true class")
    bar.outline.set_visible(False)
    return figure


def _count(number: int) -> str:
    """Pixels come in millions: four digits at most, `12.3 M`."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if number >= size:
            return f"{number / (1000 if letter == 'k' else size):.4g} {letter}"
    return str(number)


@styled
def examples_figure(
    images: np.ndarray,
    target: np.ndarray,
    score: np.ndarray,
    classes: Sequence[str],
    ids: Sequence[str],
    caption: str = "Examples; a wrong one has a dashed frame.",
) -> Figure:
    """Returns a grid of up to 6 images with truth, prediction and its probability.

    Wrong ones have a thick dashed frame and say so in the title.

    Args:
      images: uint8 `[n, h, w, c]`, c = 1 or 3, for instance those of `choose_right`.
      target: int `[n]`, indices into `classes`.
      score: float `[n, k]`, probabilities.
      classes: k class names.
      ids: n image ids.
      caption: of the figure.

    Raises:
      ValueError: no image, or more than 6.
    """
    if not 1 <= len(images) <= MOST_EXAMPLES:
        raise ValueError(f"want 1 to {MOST_EXAMPLES} examples, got {len(images)}")
    names = short_labels(classes, 16)
    predicted = score.argmax(axis=1)
    right = predicted == target
    titles = [
        f"{'right' if good else 'wrong'}: {names[called]} {row[called]:.2f}\ntruth: {names[truth]}"
        for good, called, row, truth in zip(right, predicted, score, target, strict=True)
    ]
    return image_grid(images, titles, ids, right, caption)


@styled
def finding_errors_figure(
    images: Array,
    target: np.ndarray,
    score: np.ndarray,
    classes: Sequence[str],
    ids: np.ndarray,
    thresholds: np.ndarray | None = None,
) -> Figure | None:
    """Returns the worst errors over all findings, each of another image; None without any.

    Args:
      images: uint8 `[n, h, w, c]`; only the chosen rows are taken.
      target: int8 `[n, k]`, 1, 0, or `MISSING`, which is left out.
      score: float `[n, k]`, probabilities.
      classes: k findings.
      ids: n image ids.
      thresholds: see `choose_finding_errors`.
    """
    pairs = choose_finding_errors(target, score, thresholds)
    if not len(pairs):
        return None
    names = short_labels(classes, 18)
    titles = [
        f"{'missed' if target[row, k] else 'false alarm'}: {score[row, k]:.2f}\n{names[k]}"
        for row, k in pairs
    ]
    rows = pairs[:, 0]
    caption = (
        "Worst errors: probabilities on the wrong side of their finding's threshold, by their rank "
        "among all images."
    )
    return image_grid(images[rows], titles, ids[rows], [False] * len(rows), caption)


def choose_right(target: np.ndarray, score: np.ndarray, count: int = MOST_EXAMPLES) -> np.ndarray:
    """Returns indices of the most confident right images, in turn of each class `[<= count]`.

    Args:
      target: int `[n]`, class indices.
      score: float `[n, k]`, probabilities.
      count: the most to return.
    """
    truth = score[np.arange(len(target)), target]
    right = np.flatnonzero(score.argmax(axis=1) == target)
    right = right[np.argsort(-truth[right], kind="stable")]
    return right[_in_turn(target[right])][:count]


def choose_wrong(target: np.ndarray, score: np.ndarray, count: int = MOST_EXAMPLES) -> np.ndarray:
    """Returns indices of the worst errors `[<= count]`: most certain of the wrong class first.

    Args: as of `choose_right`.
    """
    wrong = np.flatnonzero(score.argmax(axis=1) != target)
    return wrong[np.argsort(-score[wrong].max(axis=1), kind="stable")][:count]


def choose_finding_errors(
    target: np.ndarray,
    score: np.ndarray,
    thresholds: np.ndarray | None = None,
    count: int = MOST_EXAMPLES,
) -> np.ndarray:
    """Returns (image, finding) pairs `[<= count, 2]` of the worst errors, one an image.

    Probabilities of rare findings are all small: what an error is, the finding's threshold says,
    and how bad it is, the share of the images between the score and the wrong end of the scale.

    Args:
      target: int8 `[n, k]`, 1, 0 or `MISSING`.
      score: float `[n, k]`, probabilities.
      thresholds: float `[k]`, from which on a finding is called present. NaN, and None for all of
        them: the one that calls as many images as have the finding.
      count: the most to return.
    """
    called, rank = _called(target, score, thresholds), _ranks(target, score)
    error = np.where(called, rank, 1 - rank)
    error[(target == MISSING) | (called == (target == 1))] = 0.0
    finding = error.argmax(axis=1)
    worst = error[np.arange(len(target)), finding]
    wrong = np.flatnonzero(worst > 0)
    rows = wrong[np.argsort(-worst[wrong], kind="stable")][:count]
    return np.stack([rows, finding[rows]], axis=1)


def choose_found_findings(
    target: np.ndarray,
    score: np.ndarray,
    thresholds: np.ndarray | None = None,
    count: int = MOST_EXAMPLES,
) -> np.ndarray:
    """Returns (image, finding) pairs `[<= count, 2]`: findings that were found most surely.

    One an image and, as far as there are enough, of different findings. Arguments as of
    `choose_finding_errors`.
    """
    right = (target == 1) & _called(target, score, thresholds)
    found = np.where(right, _ranks(target, score), 0.0)
    finding = found.argmax(axis=1)
    surest = found[np.arange(len(target)), finding]
    rows = np.flatnonzero(surest > 0)
    rows = rows[np.argsort(-surest[rows], kind="stable")]
    rows = rows[_in_turn(finding[rows])][:count]
    return np.stack([rows, finding[rows]], axis=1)


def _called(target: np.ndarray, score: np.ndarray, thresholds: np.ndarray | None) -> np.ndarray:
    """Which findings are called present, bool `[n, k]`; see `choose_finding_errors`."""
    given = np.full(target.shape[1], np.nan) if thresholds is None else thresholds
    limits = [
        _as_many(column, scores) if np.isnan(own) else own
        for column, scores, own in zip(target.T, score.T, given, strict=True)
    ]
    return score >= np.array(limits, score.dtype)


def _as_many(target: np.ndarray, score: np.ndarray) -> float:
    """The threshold that calls as many of the known images as have the finding; inf for none."""
    positives = int((target == 1).sum())
    return np.sort(score[target != MISSING])[-positives] if positives else np.inf


def _ranks(target: np.ndarray, score: np.ndarray) -> np.ndarray:
    """The share of a finding's known images whose score is no higher, float64 `[n, k]` in 0..1.

    Half of the image itself and of those with its score counts, so that no rank is 0 or 1.
    """
    ranks = np.zeros(score.shape)
    for k, known in enumerate((target != MISSING).T):
        if known.any():
            ranks[known, k] = (rankdata(score[known, k]) - 0.5) / known.sum()
    return ranks


def _in_turn(labels: np.ndarray) -> np.ndarray:
    """The order that takes the first of every label, then the second of every label, ..."""
    turn = np.zeros(len(labels), int)
    for label in np.unique(labels):
        member = labels == label
        turn[member] = np.arange(member.sum())
    return np.lexsort((labels, turn))
