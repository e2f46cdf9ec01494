"""Classifiers against scikit-learn called directly; what is chosen, and by what."""

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from medtl_jax.errors import UserError
from medtl_jax.objectives.task import Task
from medtl_jax.traditional import classifiers
from medtl_jax.traditional.classifiers import (
    COSTS,
    KINDS,
    LEAVES,
    PENALTIES,
    WIDTHS,
    fit_classifier,
)


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    monkeypatch.setattr(classifiers, "TREES", 20)


def vectors(count, classes, seed):
    """Vectors `[count, 12]` of which three columns say the class, and the classes."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, classes, count)
    target[:classes] = np.arange(classes)
    values = rng.normal(size=(count, 12))
    values[:, :3] += np.eye(3)[target % 3] * 1.5
    return (values * 7 + 30).astype(np.float32), target.astype(np.int32)


def fitted(kind, classes, seed=0, **more):
    task = Task("classify", tuple("abcd"[:classes]))
    return fit_classifier(kind, task, *vectors(80, classes, 1), *vectors(40, classes, 2), seed=seed)


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression_is_the_one_of_lowest_validation_loss(classes):
    (train, target), (val, val_target) = vectors(80, classes, 1), vectors(40, classes, 2)
    scaler = StandardScaler().fit(train)
    losses, models = [], []
    for penalty in PENALTIES:
        model = LogisticRegression(C=penalty, max_iter=500).fit(scaler.transform(train), target)
        losses.append(log_loss(val_target, model.predict_proba(scaler.transform(val))))
        models.append(model)
    found = fitted("logistic", classes)
    assert found.chosen == {"C": PENALTIES[int(np.argmin(losses))]} and not found.unfinished
    np.testing.assert_allclose([loss for _, loss in found.path], losses, rtol=1e-5)
    test, _ = vectors(30, classes, 3)
    wanted = models[int(np.argmin(losses))].predict_proba(scaler.transform(test))
    np.testing.assert_allclose(found.score(test), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
def test_an_svm_orders_images_as_that_of_scikit_learn_does(classes):
    (train, target), (test, test_target) = vectors(80, classes, 1), vectors(60, classes, 3)
    found = fitted("svm", classes)
    chosen = [setting for setting, _ in found.path]
    assert len(chosen) == len(COSTS) * len(WIDTHS) and found.chosen in chosen
    assert found.loss == min(loss for _, loss in found.path)
    scaler = StandardScaler().fit(train)
    model = SVC(C=found.chosen["C"], gamma=found.chosen["gamma"]).fit(
        scaler.transform(train), target
    )
    decisions = model.decision_function(scaler.transform(test))
    score = found.score(test)
    np.testing.assert_allclose(score.sum(axis=1), 1, rtol=1e-5)
    if classes == 2:
        # Platt's sigmoid changes no order.
        np.testing.assert_array_equal(np.argsort(score[:, 1]), np.argsort(decisions))
        assert roc_auc_score(test_target, score[:, 1]) > 0.7
    else:
        assert (score.argmax(1) == decisions.argmax(1)).mean() > 0.8


def test_platts_sigmoid_is_that_of_the_smoothed_targets():
    """The slope and the offset solve Platt's equations: both gradients are zero."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, 2, 50)
    values = rng.normal(size=50) + target
    decisions = np.stack([-values, values], axis=1)
    found = classifiers._fit_platt(decisions, target, np.array([0, 1]))(decisions)
    smooth = np.where(
        target == 1, (target.sum() + 1) / (target.sum() + 2), 1 / ((1 - target).sum() + 2)
    )
    assert abs((found[:, 1] - smooth).sum()) < 2e-2
    assert abs(((found[:, 1] - smooth) * values).sum()) < 2e-2


@pytest.mark.parametrize("classes", [2, 4])
def test_a_forest_is_that_of_scikit_learn_with_a_vote_more(classes):
    (train, target), (val, val_target) = vectors(80, classes, 1), vectors(40, classes, 2)
    found, (test, _) = fitted("forest", classes, seed=5), vectors(30, classes, 3)
    shares = {
        leaf: RandomForestClassifier(20, min_samples_leaf=leaf, random_state=5).fit(train, target)
        for leaf in LEAVES
    }
    losses = {
        leaf: log_loss(val_target, (20 * model.predict_proba(val) + 1 / classes) / 21)
        for leaf, model in shares.items()
    }
    best = min(losses, key=losses.get)
    assert found.chosen == {"min_samples_leaf": best}
    wanted = (20 * shares[best].predict_proba(test) + 1 / classes) / 21
    np.testing.assert_allclose(found.score(test), wanted, rtol=1e-5)
    again, other = fitted("forest", classes, seed=5), fitted("forest", classes, seed=6)
    np.testing.assert_array_equal(again.score(test), found.score(test))
    assert not np.array_equal(other.score(test), found.score(test))


@pytest.mark.parametrize("kind", KINDS)
def test_classes_that_a_split_lacks(kind):
    """`c` is in no training image, `b` in no validation image: both have a probability."""
    train, target = vectors(60, 2, 1)
    val, val_target = vectors(20, 2, 2)
    task = Task("classify", ("a", "b", "c"))
    found = fit_classifier(
        kind, task, train, target, val[val_target == 0], val_target[val_target == 0]
    )
    score = found.score(val)
    assert np.isfinite(score).all() and score.shape == (20, 3) and np.isfinite(found.loss)
    np.testing.assert_allclose(score.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_fitted_is_refused(kind, monkeypatch):
    train, target = vectors(20, 2, 1)
    two = Task("classify", ("a", "b"))
    with pytest.raises(UserError, match="every training image is 'a'"):
        fit_classifier(kind, two, train, target * 0, train, target)
    with pytest.raises(UserError, match=r"one label an image \(classify\), not ordinal"):
        fit_classifier(kind, Task("ordinal", ("a", "b")), train, target, train, target)
    with pytest.raises(UserError, match="NaN or infinity"):
        fit_classifier(kind, two, train * np.float32(np.nan), target, train, target)
    monkeypatch.setattr(classifiers, "MOST_OF_SVM", 19)
    if kind == "svm":
        with pytest.raises(UserError, match=r"at most 19, there are 20; lower data.train_fraction"):
            fit_classifier(kind, two, train, target, train, target)
    else:
        fit_classifier(kind, two, train, target, train, target)


def test_what_has_not_converged_is_counted(monkeypatch):
    monkeypatch.setattr(classifiers, "_ITERATIONS", 1)
    found = fitted("logistic", 2)
    assert 0 < found.unfinished <= len(PENALTIES)
