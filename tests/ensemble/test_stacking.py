import numpy as np
import pytest
from scipy import optimize, special
from sklearn.linear_model import LogisticRegression

from medtl_jax.data.catalog import MISSING
from medtl_jax.ensemble.fusion import crossfit, fit_fusion
from medtl_jax.ensemble.stacking import fit_stack


def draws(k, n=150, m=3, seed=0):
    """Labels drawn from softmax(z), and members that say softmax(z + noise)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(scale=1.5, size=(n, k))
    target = np.array([rng.choice(k, p=p) for p in special.softmax(z, axis=1)])
    noise = rng.normal(size=(m, n, k)) * np.linspace(0.3, 2, m)[:, None, None]
    return special.softmax(z + noise, axis=-1), target


def nll(score, target):
    return -np.log(score[np.arange(len(target)), target]).mean()


def test_two_classes_are_logistic_regression_on_the_log_odds():
    scores, target = draws(2)
    stack = fit_stack("classify", scores, target)
    (model,) = stack.models
    odds = special.logit(scores[..., 1]).T
    scale = np.sqrt(odds.var(axis=0).mean())
    strength = 1 / (model.penalty * len(target) * scale**2)
    want = LogisticRegression(C=strength, tol=1e-10, max_iter=5000).fit(odds, target)
    np.testing.assert_allclose(stack.apply(scores), want.predict_proba(odds), atol=1e-4)
    assert stack.note == ""


def test_several_classes_minimise_the_penalised_loss():
    scores, target = draws(3)
    stack = fit_stack("ordinal", scores, target)
    (model,) = stack.models
    logs = np.log(scores)
    inputs = np.concatenate(list(logs - logs.mean(axis=-1, keepdims=True)), axis=1)
    scale2 = inputs.var(axis=0).mean()

    def loss(flat):
        weights, bias = flat[:-3].reshape(3, -1), flat[-3:]
        found = special.log_softmax(inputs @ weights.T + bias, axis=1)
        data = -found[np.arange(len(target)), target].mean()
        return data + model.penalty / 2 * scale2 * (weights**2).sum()

    start = np.concatenate([model.weights.ravel(), model.bias])
    assert optimize.minimize(loss, start).fun > loss(start) - 1e-6
    found = special.softmax(inputs @ model.weights.T + model.bias, axis=1)
    np.testing.assert_allclose(stack.apply(scores), found, atol=1e-9)


def test_it_beats_the_mean_where_members_differ_in_quality():
    scores, target = draws(2, n=600)
    for task in ("classify", "ordinal"):
        found = crossfit("stacking", task, scores, target)
        assert nll(found, target) < nll(scores.mean(axis=0), target) - 0.01


def test_useless_members_get_a_strong_penalty():
    scores, _ = draws(2, n=120)
    target = np.random.default_rng(1).integers(0, 2, 120)
    (model,) = fit_stack("classify", scores, target).models
    assert model.penalty >= 1
    (sure,) = fit_stack("classify", scores, (scores[0, :, 1] > 0.5).astype(int)).models
    assert sure.penalty < 1e-2


def test_a_class_without_images_keeps_the_mean():
    scores, target = draws(4)
    target[target == 2] = 0
    stack = fit_stack("classify", scores, target)
    found, mean = stack.apply(scores), scores.mean(axis=0)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_allclose(found[:, 2], mean[:, 2])
    assert stack.note == "class 2: the members' mean, for too few labels"
    one = fit_stack("classify", scores, np.zeros(len(target), int))
    np.testing.assert_allclose(one.apply(scores), mean)
    assert one.note.startswith("class 0, 1, 2, 3:")
    fusion = fit_fusion("stacking", "classify", scores, target)
    assert fusion.note == stack.note == fusion.to_json()["note"]


def test_findings_are_fitted_where_they_are_known():
    scores, target = draws(2)
    findings = np.stack([target, np.zeros_like(target), target], axis=1)
    findings[100:, 2] = MISSING
    columns = np.repeat(scores[..., 1:], 3, axis=-1)
    stack = fit_stack("multilabel", columns, findings)
    found = stack.apply(columns)
    binary = fit_stack("classify", scores, target).apply(scores)
    np.testing.assert_allclose(found[:, 0], binary[:, 1], atol=1e-5)
    np.testing.assert_allclose(found[:, 1], columns[..., 1].mean(axis=0))
    known = fit_stack("classify", scores[:, :100], target[:100]).apply(scores)
    np.testing.assert_allclose(found[:, 2], known[:, 1], atol=1e-5)
    assert stack.note == "finding 1: the members' mean, for too few labels"
    assert stack.to_json()[1] is None


def test_numbers_are_ridge_regression():
    rng = np.random.default_rng(0)
    target = rng.normal(100, 20, (80, 2))
    # One member in other units, one that is noise.
    scores = np.stack([target / 2 + 7, rng.normal(100, 20, (80, 2))])
    scores[0] += rng.normal(0, 1, (80, 2))
    target[60:, 1] = np.nan
    stack = fit_stack("regress", scores, target)
    for j, count in enumerate((80, 60)):
        inputs, truth = scores[:, :count, j].T, target[:count, j]
        centred, scale2 = inputs - inputs.mean(axis=0), inputs.var(axis=0).mean()
        # The normal equations of ridge regression, in the units of the inputs.
        gram = centred.T @ centred + stack.models[j].penalty * count * scale2 * np.eye(2)
        weights = np.linalg.solve(gram, centred.T @ (truth - truth.mean()))
        np.testing.assert_allclose(stack.models[j].weights[0], weights, rtol=1e-6)
        want = truth.mean() + (scores[:, :, j].T - inputs.mean(axis=0)) @ weights
        np.testing.assert_allclose(stack.apply(scores)[:, j], want)
    assert np.nanstd(stack.apply(scores) - target) < 4
    target[:, 1] = np.nan
    some = fit_stack("regress", scores, target)
    np.testing.assert_allclose(some.apply(scores)[:, 1], scores[..., 1].mean(axis=0))
    assert some.note == "number 1: the members' mean, for too few labels"


def test_separable_labels_converge_and_repeat():
    scores, _ = draws(3, n=40)
    target = scores[0].argmax(axis=-1)
    first, second = (fit_stack("classify", scores, target).apply(scores) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.isfinite(first).all()


def test_whole_patients_choose_the_penalty():
    # Images of a patient are copies with a label of their own: without patients they are learnt
    # by heart, with them there is nothing to learn.
    rng = np.random.default_rng(0)
    present = np.repeat(rng.uniform(0.05, 0.95, (6, 12)), 15, axis=1)
    scores, target = (
        np.stack([1 - present, present], axis=-1),
        np.repeat(rng.integers(0, 2, 12), 15),
    )
    patients = np.repeat(np.arange(12), 15)
    (images,) = fit_stack("classify", scores, target).models
    (whole,) = fit_stack("classify", scores, target, patients=patients).models
    assert whole.penalty > images.penalty
    (alone,) = fit_stack("classify", scores, target, patients=np.zeros(180, int)).models
    assert alone is None


@pytest.mark.parametrize("n", [2, 3, 7])
def test_few_images(n):
    scores, _ = draws(3, n=n)
    found = fit_stack("classify", scores, np.arange(n) % 3).apply(scores)
    np.testing.assert_allclose(found.sum(axis=1), 1)
