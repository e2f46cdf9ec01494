"""How unlike members are, and whether their disagreement tells which images are wrong."""

from collections.abc import Sequence

import numpy as np

from experiments.ensemble_candidates import Candidate
from medtl_jax.ensemble.uncertainty import image_uncertainty, spread
from medtl_jax.metrics.diversity import diversity
from medtl_jax.metrics.pairing import Predicted
from medtl_jax.metrics.rejection import image_errors, rejection_curve, rejection_scores
from medtl_jax.metrics.scores import prepare
from medtl_jax.report.ensemble import Diversity, Rejection

_TOTAL, _EXPECTED, _MUTUAL = "predictive entropy", "expected entropy", "mutual information"
# What `image_errors` are, by task.
_ERRORS = {
    "classify": "share of wrong images",
    "ordinal": "share of wrong images",
    "multilabel": "share of findings called wrong",
    "segment": "1 - Dice",
    "regress": "absolute error",
}
# Points of a curve that is drawn.
_MOST_POINTS = 200


def member_diversity(members: Sequence[Candidate]) -> dict[str, Diversity]:
    """The measures of `metrics.diversity` on the test split, by name."""
    test = members[0].test
    measures = diversity(test.task, test.target, [member.test.score for member in members])
    return {
        name: Diversity(tuple(map(tuple, found.pairs.tolist())), found.mean, found.reason)
        for name, found in measures.items()
    }


def rejections(
    members: Sequence[Candidate], picked: Candidate, config: dict
) -> tuple[dict[str, float], tuple[Rejection, ...]]:
    """The mean of each measure of the members' uncertainty on the test split, and what it is worth.

    That is the error of the picked fusion on the images that are kept where the most uncertain ones
    are left to a reader. A number whose value no image has known is left out, as its metrics are
    undefined.
    """
    test = picked.test
    cases = prepare(test.task, test.target, test.score, test.classes, surfaces=False)
    errors = image_errors(test.task, cases)
    measures = _uncertainty(test, [member.test.score for member in members])
    options = {"resamples": config["eval"]["resamples"], "seed": config["seed"]}
    found = []
    for number, (name, values) in enumerate(measures.items()):
        # Of numbers each has an error, and a spread, of its own.
        own = errors[:, number] if test.task == "regress" else errors
        if name == _EXPECTED or np.isnan(own).all():
            continue
        curve = rejection_curve(values, own)
        some = np.unique(np.linspace(0, len(curve.rejected) - 1, _MOST_POINTS).astype(int))
        found.append(
            Rejection(
                measure=name,
                noun=_ERRORS[test.task],
                rejected=tuple(curve.rejected[some].tolist()),
                error=tuple(curve.error[some].tolist()),
                oracle=tuple(curve.oracle[some].tolist()),
                scores=rejection_scores(values, own, test.patients, **options),
            )
        )
    return {name: float(values.mean()) for name, values in measures.items()}, tuple(found)


def _uncertainty(test: Predicted, scores: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The measures of each image `[n]`, entropies in nats; of numbers one for each."""
    if test.task == "regress":
        apart = spread(scores)
        return {f"spread of {name}": apart[:, i] for i, name in enumerate(test.classes)}
    found = image_uncertainty(test.task, scores)
    return {_TOTAL: found.total, _EXPECTED: found.expected, _MUTUAL: found.mutual}
