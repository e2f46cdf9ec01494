"""From predictions to the table, for every task, without a network."""

import dataclasses

import digit_runs
import numpy as np
import pytest
from sklearn.metrics import log_loss

from medtl_jax.metrics.pairing import Predicted
from medtl_jax.objectives.task import Task

CLASSES = ("a", "b", "c")
OUTPUTS = {
    "classify": Task("classify", CLASSES),
    "ordinal": Task("ordinal", CLASSES),
    "multilabel": Task("multilabel", CLASSES),
    "segment": Task("segment", CLASSES),
    "regress": Task("regress", ("x", "y"), mean=(5.0, 50.0), std=(2.0, 10.0)),
}
N, SIDE = 40, 6


def normal(score: np.ndarray) -> np.ndarray:
    return score / score.sum(axis=-1, keepdims=True)


def truth(task: str, rng) -> np.ndarray:
    if task == "regress":
        return rng.normal((5.0, 50.0), (2.0, 10.0), (N, 2)).astype(np.float32)
    if task == "multilabel":
        found = rng.integers(0, 2, (N, 3)).astype(np.int8)
        found[0, 0] = -1  # not known
        return found
    shape = (N, SIDE, SIDE) if task == "segment" else (N,)
    return rng.integers(0, 3, shape).astype(np.uint8)


def predicted(task: str, target: np.ndarray, rng, skill: float) -> np.ndarray:
    """What a member of some skill says of the target."""
    if task == "regress":
        return (target + rng.normal(0, (2.0, 10.0), target.shape) / skill).astype(np.float32)
    if task == "multilabel":
        logits = skill * (2.0 * (target == 1) - 1) + rng.normal(0, 2, target.shape)
        return (1 / (1 + np.exp(-logits))).astype(np.float32)
    logits = skill * np.eye(3)[target] + rng.normal(0, 1, (*target.shape, 3))
    kind = np.float16 if task == "segment" else np.float32
    return normal(np.exp(logits)).astype(kind)


def members_of(task: str):
    """Four members of one task, the second of which is the best by far."""
    from experiments.ensemble_candidates import Candidate
    from medtl_jax.report.ensemble import MEMBER

    rng = np.random.default_rng(7)
    ids = np.array([f"{i:03d}" for i in range(N)])
    targets = [truth(task, rng) for _ in range(2)]
    classes = OUTPUTS[task].classes
    found = []
    for place, skill in enumerate((1.0, 3.0, 1.0, 1.0)):
        val, test = (
            Predicted(f"m{place}", task, classes, ids, t, predicted(task, t, rng, skill))
            for t in targets
        )
        found.append(
            Candidate(f"m{place}", MEMBER, val, test, {"net": 1}, {"folder": f"cells/{place}"})
        )
    return found


def config_of(**train) -> dict:
    from configs import default

    config = default.get_config().to_dict()
    return {
        **config,
        "train": {**config["train"], **train},
        "eval": {**config["eval"], "resamples": 60},
    }


@pytest.fixture(scope="module", params=OUTPUTS)
def worked(request, small_runs):
    """Task, members, candidates and result of one task."""
    from experiments.ensemble_candidates import fit_fusions, fuse, names_of
    from experiments.ensemble_results import collect
    from medtl_jax.report.ensemble import NetworkCost

    task, members, config = OUTPUTS[request.param], members_of(request.param), config_of()
    names = names_of(config, task.name, len(task.classes))
    fitted = fit_fusions(names, [one.val for one in members], 0)
    candidates = [*members, *fuse(fitted, members)]
    costs = {"net": NetworkCost(1000, 2.0)}
    console = digit_runs.Notes()
    found = collect(candidates, costs, task, config, "CPU", ["a note"], console)
    return task, members, candidates, found


def test_every_task_has_a_result(worked):
    task, members, candidates, found = worked
    assert found.best == "m1" and found.row(found.picked).kind == "fusion"
    assert [row.name for row in found.members] == [one.name for one in members]
    mean = found.row("mean")
    assert mean.networks == 4 and (mean.cost.parameters, mean.cost.milliseconds) == (4000, 8.0)
    score = np.mean([one.test.score.astype(np.float64) for one in members], axis=0)
    fused = next(one for one in candidates if one.name == "mean").test.score
    np.testing.assert_allclose(fused, score, atol=1e-3 if task.name == "segment" else 1e-5)
    assert fused.dtype == members[0].test.score.dtype
    assert set(mean.against) == set(found.metrics)
    assert (mean.calibration == {}) == (task.name == "regress")
    assert all(len(one.pairs) == 4 for one in found.diversity.values())
    assert len(found.rejections) == 2
    for curve in found.rejections:
        assert curve.scores["area_oracle"]["value"] <= curve.scores["area"]["value"] + 1e-12


def test_the_loss_is_that_of_the_task(worked):
    task, members, _, found = worked
    target, score = members[0].val.target, members[0].val.score.astype(np.float64)
    if task.name == "regress":
        wanted = (((score - target) / np.array(task.std)) ** 2).mean()
    elif task.name == "multilabel":
        known = target != -1
        wanted = log_loss(target[known], score[known])
    else:
        wanted = log_loss(target.ravel(), normal(score).reshape(-1, 3))
    tolerance = 1e-3 if task.name == "segment" else 1e-5
    assert found.row("m0").validation == pytest.approx(wanted, rel=tolerance)


def test_nothing_is_fitted_to_the_test(small_runs):
    """Other test targets, in another order: the same weights, predictions and pick."""
    from experiments.ensemble_candidates import fit_fusions, fuse
    from experiments.ensemble_results import collect
    from medtl_jax.report.ensemble import NetworkCost

    task, members, config = OUTPUTS["classify"], members_of("classify"), config_of()
    turned = [
        dataclasses.replace(
            one, test=dataclasses.replace(one.test, target=(one.test.target[::-1] + 1) % 3)
        )
        for one in members
    ]
    found = []
    for given in (members, turned):
        fitted = fit_fusions(
            ["weighted", "stacking", "greedy"], [one.val for one in given], config["seed"]
        )
        fused = fuse(fitted, given)
        result = collect(
            [*given, *fused], {"net": NetworkCost(1, 1.0)}, task, config, "CPU", [],
            digit_runs.Notes(),
        )  # fmt: skip
        found.append((fused, result))
    (one, first), (other, second) = found
    assert [a.made_of for a in one] == [b.made_of for b in other]
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.test.score, b.test.score)
    assert (first.picked, first.best) == (second.picked, second.best)
    assert [row.validation for row in first.rows] == [row.validation for row in second.rows]
    assert first.row("stacking").test["auc"].value != second.row("stacking").test["auc"].value


def test_cross_fitting_does_not_flatter_a_fit_to_noise(small_runs):
    """Members that know nothing: stacking beats chance on the images it was fitted to alone."""
    from experiments.ensemble_candidates import fit_fusions, validation_value

    rng = np.random.default_rng(3)
    ids, target = np.arange(N).astype(str), rng.integers(0, 3, N)
    val = [
        Predicted(
            str(m), "classify", CLASSES, ids, target,
            normal(np.exp(rng.normal(0, 2, (N, 3)))).astype(np.float32),
        )
        for m in range(8)
    ]  # fmt: skip
    fitted = fit_fusions(["weighted"], val, 0)["weighted"]
    seen = fitted.fusion.apply([one.score for one in val])
    task = OUTPUTS["classify"]
    own, honest = (
        validation_value(task, "loss", dataclasses.replace(val[0], score=score))
        for score in (seen, fitted.val)
    )
    assert honest > own


def test_ranks_have_no_loss_and_are_never_calibrated_or_picked(small_runs):
    from experiments.ensemble_candidates import (
        candidate_value,
        fit_fusions,
        fuse,
        gives_probabilities,
    )
    from experiments.ensemble_results import _pick
    from medtl_jax.report.ensemble import FUSION

    members = members_of("multilabel")
    fitted = fit_fusions(["rank"], [one.val for one in members], 0)
    (rank,) = fuse(fitted, members)
    task = OUTPUTS["multilabel"]
    assert candidate_value(task, "loss", rank) is None and not gives_probabilities(rank)
    assert candidate_value(task, "auc", rank) > 0.5
    # A single image has no rank: what is picked scores any image.
    fitted = fit_fusions(["rank", "mean"], [one.val for one in members], 0)
    values = {"rank": 1.0, "mean": 0.5}
    assert _pick(fuse(fitted, members), FUSION, values, more_is_better=True) == "mean"


def test_a_soup_of_equal_members_predicts_as_they_do(small_runs, five, tmp_path):
    """LeNet has no batch norms: the soup of one network twice is that network."""
    from experiments import ensemble_soups
    from experiments.ensemble_candidates import read_members
    from experiments.ensemble_cells import make_cells
    from experiments.ensemble_soups import make_soups
    from experiments.ladder_training import run_seeds
    from experiments.trained import open_run, read_card

    weights = digit_runs.run(tmp_path / "weights", five, "none", train__epochs=1)
    settings = {"train__epochs": 1, "eval__drift": False}
    one = digit_runs.make_request(tmp_path / "study", five, weights, **settings)
    config = {**one.config, "experiment": "ensemble"}
    config["ensemble"] = {**config["ensemble"], "members": 2}
    request = dataclasses.replace(one, config=config)
    cells = make_cells(config)
    run_seeds(cells, request, {}, "")
    members = read_members(cells, request.folder)
    task = read_card(cells[0].folder(request.folder)).task
    best = open_run(cells[1].folder(request.folder)).fitted.variables
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble_soups, "_variables", lambda folders: iter([best, best]))
        soups, notes = make_soups(cells, members, request, {}, task)
    assert not notes and [soup.name for soup in soups] == ["uniform soup", "greedy soup"]
    for soup in soups:
        np.testing.assert_array_equal(np.sort(soup.test.ids), members[1].test.ids)
        order = np.argsort(soup.test.ids)
        np.testing.assert_allclose(soup.test.score[order], members[1].test.score, atol=1e-6)
    # The second is as good as the first, and is kept.
    assert sorted(soups[1].made_of["members"]) == [member.name for member in members]


def test_the_first_of_equals_is_told(small_runs):
    from experiments.ensemble_candidates import fit_fusions, fuse
    from experiments.ensemble_results import collect
    from medtl_jax.report.ensemble import NetworkCost

    first, best, *others = members_of("classify")
    twins = [dataclasses.replace(best, name=name) for name in ("again", "once more")]
    costs, console = {"net": NetworkCost(1, 1.0)}, digit_runs.Notes()

    def notes(members, names=("mean",)):
        fused = fuse(fit_fusions(names, [one.val for one in members], 0), members)
        task, given = OUTPUTS["classify"], [*members, *fused]
        return collect(given, costs, task, config_of(), "CPU", ["a note"], console).notes

    assert notes([first, best, *others]) == ("a note",)
    told = "m1 is the first of equals: again has the same validation loss"
    assert notes([first, best, *others, twins[0]]) == ("a note", told)
    told = "m1 is the first of equals: again, once more have the same validation loss"
    assert notes([best, *twins]) == ("a note", told)
