"""From what members, fusions and soups predict to the result: values, gains, verdicts, the pick."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.ensemble_candidates import Candidate, candidate_value, gives_probabilities
from experiments.ensemble_diversity import member_diversity, rejections
from experiments.ladder_results import sampled_runs
from medtl_jax.console import Console
from medtl_jax.ensemble.fusion import FUSIONS
from medtl_jax.metrics.calibration import CALIBRATED
from medtl_jax.metrics.pairing import Predicted
from medtl_jax.metrics.scores import task_scores
from medtl_jax.metrics.seeds import Judged, Sampled, difference, judge, over_seeds, pick
from medtl_jax.metrics.temperature import fit_temperature, scaled
from medtl_jax.metrics.uncertainty import score_with_intervals
from medtl_jax.objectives.task import Task
from medtl_jax.report.ensemble import FUSION, MEMBER, Ensemble, NetworkCost, Row
from medtl_jax.report.predict import Predictions
from medtl_jax.report.study_page import entry_of


def collect(
    candidates: Sequence[Candidate],
    costs: Mapping[str, NetworkCost],
    task: Task,
    config: dict,
    device: str,
    notes: Sequence[str],
    console: Console,
) -> Ensemble:
    """The result of an ensemble.

    Args:
      candidates: members, fusions and soups, of the same images.
      costs: of a network, by the labels in `Candidate.uses`.
      task: of all.
      config: of the study.
      device: that the costs are of.
      notes: for the report.
      console: shows how far it is.
    """
    select, test = config["train"]["select"], candidates[0].test
    sampled = dict(
        zip(
            (one.name for one in candidates),
            sampled_runs((one.test for one in candidates), len(candidates), config, console),
            strict=True,
        )
    )
    values = {one.name: candidate_value(task, select, one) for one in candidates}
    best, picked = (
        _pick(candidates, kind, values, task.selection[select]) for kind in (MEMBER, FUSION)
    )
    against = _gains(candidates, sampled, best)
    rows = tuple(
        _row(one, task, values[one.name], sampled[one.name], against.get(one.name, {}), costs)
        for one in candidates
    )
    members = [one for one in candidates if one.kind == MEMBER]
    chosen = next((one for one in candidates if one.name == picked), None)
    uncertainty, curves = rejections(members, chosen, config) if chosen else ({}, ())
    return Ensemble(
        rows=rows,
        best=best,
        picked=picked,
        select=select,
        summaries={one.name: FUSIONS[one.name].summary for one in candidates if one.kind == FUSION},
        diversity=member_diversity(members),
        uncertainty=uncertainty,
        rejections=curves,
        images=len(test.ids),
        patients=None if test.patients is None else len(np.unique(test.patients)),
        device=device,
        batch=config["eval"]["batch_size"],
        notes=(*notes, *_ties(candidates, values, select, (best, picked))),
    )


def _row(
    one: Candidate,
    task: Task,
    value: float | None,
    sampled: Sampled,
    against: Mapping[str, Judged],
    costs: Mapping[str, NetworkCost],
) -> Row:
    """The row of a candidate, `value` being that of validation."""
    return Row(
        name=one.name,
        kind=one.kind,
        made_of=one.made_of,
        validation=value,
        test={metric: over_seeds([sampled], metric) for metric in sampled.values},
        against=against,
        **_calibration(task, one),
        networks=sum(one.uses.values()),
        cost=_cost(one, costs),
    )


def _pick(
    candidates: Sequence[Candidate],
    kind: str,
    values: Mapping[str, float | None],
    more_is_better: bool,
) -> str:
    """The candidate of a kind that is best on validation; of fusions one that scores any image."""
    own = {name: [values[name]] for name in _pickable(candidates, kind)}
    return pick(own, more_is_better)


def _pickable(candidates: Sequence[Candidate], kind: str) -> list[str]:
    """The candidates of a kind, of fusions those that score any image."""
    return [
        one.name
        for one in candidates
        if one.kind == kind and not (kind == FUSION and FUSIONS[one.name].whole_set)
    ]


def _ties(
    candidates: Sequence[Candidate],
    values: Mapping[str, float | None],
    select: str,
    chosen: Sequence[str],
) -> list[str]:
    """A note on each of the `chosen` that was so as the first of equals."""
    kinds = {one.name: one.kind for one in candidates}
    notes = []
    for name in filter(None, chosen):
        others = _pickable(candidates, kinds[name])
        equal = [other for other in others if other != name and values[other] == values[name]]
        if equal:
            notes.append(
                f"{name} is the first of equals: {', '.join(equal)} "
                f"{'has' if len(equal) == 1 else 'have'} the same validation {select}"
            )
    return notes


def _gains(
    candidates: Sequence[Candidate], sampled: Mapping[str, Sampled], best: str
) -> dict[str, dict[str, Judged]]:
    """The differences of fusions and soups to the best member, with their verdicts."""
    if not best:
        return {}
    reference = [sampled[best]]
    return judge({
        one.name: {
            metric: difference([sampled[one.name]], reference, metric)
            for metric in reference[0].values
        }
        for one in candidates
        if one.kind != MEMBER
    })  # fmt: skip


def _calibration(task: Task, one: Candidate) -> dict[str, Any]:
    """The fields of `Row` on the test probabilities before and after validation's temperature."""
    if not gives_probabilities(one):
        return {"calibration": {}, "unscaled": ""}
    val, test = one.val, one.test
    temperatures = fit_temperature(task.name, val.target, val.score)
    before, after = (
        task_scores(task.name, test.target, score, task.classes, surfaces=False)
        for score in (test.score, scaled(task.name, test.score, temperatures))
    )
    names = [f" for {name}" for name in task.classes] if task.name == "multilabel" else [""]
    kept = [
        f"kept at 1{name}, {found.reason}"
        for name, found in zip(names, temperatures, strict=True)
        if found.reason
    ]
    return {
        "calibration": {name: (before[name].value, after[name].value) for name in CALIBRATED},
        "unscaled": "; ".join(kept),
    }


def _cost(one: Candidate, costs: Mapping[str, NetworkCost]) -> NetworkCost:
    return NetworkCost(
        sum(count * costs[label].parameters for label, count in one.uses.items()),
        math.fsum(count * costs[label].milliseconds for label, count in one.uses.items()),
    )


def picked_predictions(picked: Candidate) -> dict[str, Predictions]:
    """What the ensemble predicts, for `predictions.npz`; of validation by cross-fitting."""
    return {"val": _predictions(picked.val), "test": _predictions(picked.test)}


def _predictions(found: Predicted) -> Predictions:
    # The images are those of every member; the file has none.
    images = np.empty((len(found.ids), 0, 0, 1), np.uint8)
    return Predictions(found.ids, found.target, found.score, images, found.patients)


def metrics_of(found: Ensemble, picked: Candidate | None, config: dict) -> dict[str, dict]:
    """The test metrics for `metrics.json`: the overall ones of the picked fusion as of a run.

    Beside them stand the primary ones of every row, as `metric/row`.
    """
    rows = {
        f"{metric}/{row.name}": {**entry_of(value), "n": found.images}
        for row in found.rows
        for metric, value in row.test.items()
    }
    if picked is None:
        return rows
    test = picked.test
    options = {"resamples": config["eval"]["resamples"], "seed": config["seed"]}
    if test.task == "segment":
        options["tolerance"] = config["eval"]["surface_tolerance"]
    scores = score_with_intervals(
        test.task, test.target, test.score, test.classes, test.patients, **options
    )
    return {name: entry for name, entry in scores.items() if "/" not in name} | rows
