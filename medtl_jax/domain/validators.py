"""Numbers that rate a network on unlabelled target images; see `domain.selection` for their use.

None of them measures what one wants to know. `entropy` and `infomax` are what some methods minimise
(entropy minimisation, MCC), whose value is then good whether or not the classes are right.
`entropy` and `snd` are best for a network that calls every image the same; `infomax` is not. `dev`
needs domains that overlap in feature space: of source images that are nothing like the target's the
weights are near 0, and the risk hangs on a few of them.
"""

import math

import numpy as np
from scipy import special
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from medtl_jax.errors import UserError

# Most rows to work on: images, or pixels of masks. SND takes time with the square of them.
MOST_ROWS = 10_000
TEMPERATURE = 0.05
# Most images of each domain that the ratio of their densities is fitted by, and the fewest.
FIT_ROWS = 5_000
_FEWEST = 10
# Inverse penalties to choose from.
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)

# Numbers held at a time: 32 MiB as float32.
_BLOCK = 2**23
# Probabilities may have been stored as float16.
_SUMS_TO_ONE = 0.01


def distributions(
    task: str, score: np.ndarray, *, limit: int = MOST_ROWS, seed: int = 0
) -> np.ndarray:
    """Returns the probability distributions in a task's scores, float32 `[m, k]` or `[m, f, 2]`.

    `classify`, `ordinal`: the rows of the score `[n, k]`. `multilabel`: of each of f findings its
    absence and presence, of a score `[n, f]`. `segment`: the pixels of a score `[n, h, w, k]`.
    Above `limit` so many images or pixels are drawn without replacement, the same ones for the
    same `seed` and shape.

    Args:
      task: one of `catalog.TASKS`.
      score: as `objectives.task.Task` has it.
      limit: most rows of the result.
      seed: of the draw.

    Raises:
      ValueError: `regress`: numbers have no probabilities.
    """
    if task == "regress":
        raise ValueError("regress predicts numbers without probabilities")
    places = score.shape[:3] if task == "segment" else score.shape[:1]
    chosen = sampled_rows(math.prod(places), limit, seed)
    rows = score[np.unravel_index(chosen, places)].astype(np.float32)
    return np.stack([1 - rows, rows], axis=-1) if task == "multilabel" else rows


def sampled_rows(count: int, limit: int, seed: int) -> np.ndarray:
    """Returns at most `limit` of the rows 0 to `count` - 1, sorted, int64; all where that fits."""
    if count <= limit:
        return np.arange(count)
    drawn = np.random.default_rng((seed, count, limit)).choice(
        count, limit, replace=False, shuffle=False
    )
    return np.sort(drawn)


def entropy(probabilities: np.ndarray) -> float:
    """Returns the mean entropy of the predictions in nats; lower is better (Morerio et al. 2018).

    NaN where a probability is not finite, as of a training that has diverged.

    Args:
      probabilities: `[m, k]` or `[m, f, 2]`, which sum to 1 over the last axis.

    Raises:
      ValueError: they do not, or there are none.
    """
    known = _checked(probabilities)
    return math.nan if known is None else float(special.entr(known).sum(axis=-1).mean())


def infomax(probabilities: np.ndarray) -> float:
    """Returns the mutual information of image and prediction in nats; higher is better.

    It is the entropy of the mean prediction less the mean entropy of the predictions (Shi & Sha
    2012): large where the network is sure of each image and uses all classes. Of several findings
    it is the mean over them. Arguments and errors are those of `entropy`.
    """
    known = _checked(probabilities)
    if known is None:
        return math.nan
    marginal = special.entr(known.mean(axis=0)).sum(axis=-1).mean()
    return float(marginal - special.entr(known).sum(axis=-1).mean())


def snd(
    rows: np.ndarray,
    *,
    temperature: float = TEMPERATURE,
    limit: int = MOST_ROWS,
    seed: int = 0,
) -> float:
    """Returns the soft neighbourhood density in nats; higher is better (Saito et al. 2021).

    With similarities s_ij, the cosine of rows i and j, and the distribution p_i over all j but i,
    p_ij in proportion to exp(s_ij / temperature), it is the mean entropy of the p_i: large where
    an image has many neighbours that are equally near. It is worked out block by block.

    Args:
      rows: softmax outputs, as in the paper, or features: `[n, d]`, or `[n, f, 2]` of findings.
      temperature: 0.05 in the paper.
      limit: most rows; above it so many are drawn, the same ones for the same `seed`.
      seed: of the draw.

    Raises:
      ValueError: fewer than two axes; a temperature that is not above 0.
    """
    if rows.ndim < 2 or not temperature > 0:
        raise ValueError(f"want rows [n, d] and a temperature, got {rows.shape}, {temperature}")
    rows = rows[sampled_rows(len(rows), limit, seed)].reshape(min(len(rows), limit), -1)
    rows = rows.astype(np.float32)
    # One row alone has no neighbours.
    if len(rows) < 2 or not np.isfinite(rows).all():
        return math.nan
    # The largest number first: squares of large features would overflow.
    scale = np.abs(rows).max(axis=1, keepdims=True)
    rows = rows / np.where(scale > 0, scale, 1)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))
    size = max(1, _BLOCK // len(rows))
    total = sum(
        float(_neighbour_entropy(rows, start, min(start + size, len(rows)), temperature).sum())
        for start in range(0, len(rows), size)
    )
    return total / len(rows)


def _neighbour_entropy(rows: np.ndarray, start: int, stop: int, temperature: float) -> np.ndarray:
    """Entropy of the neighbours of each of the unit rows `start` to `stop`, float64."""
    # At most 0, so that no exponential overflows; the nearest other row is the 1 that keeps the
    # sum from vanishing at low temperatures.
    scores = (rows[start:stop] @ rows.T) / np.float32(temperature)
    own = np.arange(stop - start), np.arange(start, stop)
    scores[own] = -np.inf
    scores -= scores.max(axis=1, keepdims=True)
    weights = np.exp(scores)
    scores[own] = 0
    sums = weights.sum(axis=1, dtype=np.float64)
    return np.log(sums) - np.einsum("ij,ij->i", weights, scores, dtype=np.float64) / sums


def check_dev(source: int, target: int) -> None:
    """UserError where so many training images of the domains are too few for `dev`."""
    if min(source, target) < _FEWEST:
        raise UserError(
            f"the validator dev needs {_FEWEST} training images of each domain, there are "
            f"{source} of the source and {target} of the target: choose another validator"
        )


def density_ratio(
    source: np.ndarray, target: np.ndarray, at: np.ndarray, *, limit: int = FIT_ROWS, seed: int = 0
) -> np.ndarray:
    """Returns how much denser the target is than the source at some features, float64 `[v]`.

    A logistic regression on standardised features tells the domains apart; its odds of target to
    source, times n_source / n_target, are the ratio (Bickel et al. 2007). Its penalty is the one
    with the least log loss on a fifth of the rows, as in the paper of `dev`: with too small a one
    the odds of many features are beyond all measure.

    Args:
      source: features `[n, d]` to fit by.
      target: features `[m, d]` to fit by.
      at: features `[v, d]`, which should be of other images than `source`.
      limit: most rows of each domain to fit by.
      seed: of their draw, and of the fifth.

    Raises:
      UserError: fewer than `_FEWEST` rows of a domain.
    """
    check_dev(len(source), len(target))
    parts = [part[sampled_rows(len(part), limit, seed)] for part in (source, target)]
    rows = np.concatenate(parts).astype(np.float64)
    domain = np.repeat([0, 1], [len(part) for part in parts])
    fitted, held = train_test_split(
        np.arange(len(rows)), test_size=0.2, stratify=domain, random_state=seed
    )

    def loss(strength: float) -> float:
        model = _classifier(strength).fit(rows[fitted], domain[fitted])
        return log_loss(domain[held], model.predict_proba(rows[held]))

    model = _classifier(min(_STRENGTHS, key=loss)).fit(rows, domain)
    odds = np.exp(np.clip(model.decision_function(at.astype(np.float64)), -30, 30))
    return odds * len(parts[0]) / len(parts[1])


def _classifier(strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=10_000))


def dev(
    source_train_features: np.ndarray,
    source_features: np.ndarray,
    source_losses: np.ndarray,
    target_features: np.ndarray,
    *,
    limit: int = FIT_ROWS,
    seed: int = 0,
) -> float:
    """Returns the risk on the target that source labels let expect; lower is better.

    Deep embedded validation (You et al. 2019, algorithm 1): the losses l of source validation
    images are weighted by the density ratio w of their features. The mean of w is known to be 1,
    which makes it a control variate: with eta = -Cov(w l, w) / Var(w) the risk is
    mean(w l) + eta (mean(w) - 1). Where w does not vary, eta is 0.

    NaN where a feature or a loss is not finite.

    Args:
      source_train_features: `[n, d]`, which the ratio is fitted by.
      source_features: `[v, d]`, of the validation images.
      source_losses: `[v]`.
      target_features: `[m, d]`, of unlabelled target images.
      limit: most rows of each domain to fit the ratio by.
      seed: of their draw.

    Raises:
      UserError: as `density_ratio`.
      ValueError: losses and features of different lengths.
    """
    if source_losses.shape != source_features.shape[:1]:
        raise ValueError(f"{len(source_features)} features for losses {source_losses.shape}")
    arrays = source_train_features, source_features, source_losses, target_features
    if not all(np.isfinite(array).all() for array in arrays):
        return math.nan
    weights = density_ratio(
        source_train_features, target_features, source_features, limit=limit, seed=seed
    )
    return controlled_risk(source_losses, weights)


def controlled_risk(losses: np.ndarray, weights: np.ndarray) -> float:
    """Returns the mean of the weighted losses `[v]`, weights of mean 1 as control variate."""
    weighted = weights * losses.astype(np.float64)
    spread = weights.var()
    shared = ((weighted - weighted.mean()) * (weights - weights.mean())).mean()
    eta = -shared / spread if spread > 0 else 0.0
    return float(weighted.mean() + eta * (weights.mean() - 1))


def _checked(probabilities: np.ndarray) -> np.ndarray | None:
    """The probabilities as float64, summing to 1; None where some are not finite."""
    if probabilities.ndim < 2 or not probabilities.size:
        raise ValueError(f"want probabilities [m, k] or [m, f, 2], got {probabilities.shape}")
    known = probabilities.astype(np.float64)
    if not np.isfinite(known).all():
        return None
    sums = known.sum(axis=-1, keepdims=True)
    if known.min() < -_SUMS_TO_ONE or np.abs(sums - 1).max() > _SUMS_TO_ONE:
        raise ValueError("want probabilities: numbers of 0 or more that sum to 1")
    return np.maximum(known, 0) / sums
