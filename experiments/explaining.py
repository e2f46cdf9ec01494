"""Class activation maps of some right and wrong cases, for the report."""

import numpy as np

from experiments.study import Fitted
from medtl_jax.report.explanations import Explanations, choose_cases
from medtl_jax.report.gradcam import randomised_check
from medtl_jax.report.predict import Predictions


def explain(
    fitted: Fitted, found: Predictions, seed: int, thresholds: np.ndarray | None = None
) -> Explanations | None:
    """Grad-CAM of chosen images and its check; None for masks, which show what was looked at.

    `thresholds` are those of findings, see `choose_cases`.
    """
    task = fitted.task
    if task.name == "segment":
        return None
    cases = choose_cases(task.name, found.target, found.score, task.classes, thresholds=thresholds)
    if not len(cases.rows):
        return None
    images = found.images[cases.rows]
    # The expected rank is the one output that an ordered class has.
    output = None if task.name == "ordinal" else cases.label
    check = randomised_check(
        fitted.network, fitted.variables, fitted.spec, images, output, task, seed=seed
    )
    return Explanations(cases, images, check.maps, check.randomised, check.correlation)
