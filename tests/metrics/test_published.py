"""The columns of published tables against scikit-learn, and each against the others."""

import numpy as np
import pytest
from sklearn import metrics as sk

from medtl_jax.metrics.published import TABLE_2, TABLE_3, published_scores
from medtl_jax.metrics.scores import prepare


def drawn(count, classes, seed):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, classes, count)
    score = rng.dirichlet(np.ones(classes), count) + 0.5 * np.eye(classes)[target]
    return target, score / score.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 4])
def test_columns_are_those_of_scikit_learn_on_the_drawn_images(classes):
    target, score = drawn(60, classes, 1)
    cases = prepare("classify", target, score, tuple("abcd"[:classes]))
    rng = np.random.default_rng(2)
    counts = rng.multinomial(60, np.full(60, 1 / 60), size=5).T
    found = published_scores(cases, counts)
    assert tuple(found) == (*TABLE_2, *TABLE_3)
    for column in range(5):
        rows = np.repeat(np.arange(60), counts[:, column])
        truth, called, share = target[rows], score[rows].argmax(1), score[rows]
        average = {"average": "binary"} if classes == 2 else {"average": "macro"}
        table = sk.confusion_matrix(truth, called, labels=range(classes))
        fall = table.sum(axis=0) - np.diag(table)
        rejected = 1 - fall / (table.sum() - table.sum(axis=1))
        away = share - np.eye(classes)[truth]
        away = away[:, 1] if classes == 2 else away
        wanted = {
            "accuracy": sk.accuracy_score(truth, called),
            "precision": sk.precision_score(truth, called, **average),
            "recall": sk.recall_score(truth, called, **average),
            "specificity": rejected[1] if classes == 2 else rejected.mean(),
            "f1": sk.f1_score(truth, called, **average),
            "dice": sk.f1_score(truth, called, **average),
            "iou": sk.jaccard_score(truth, called, **average),
            "mae": np.abs(away).mean(),
            "mse": (away**2).mean(),
        }
        if classes == 2:
            assert wanted["mse"] == pytest.approx(sk.brier_score_loss(truth, share[:, 1]))
        for name, value in wanted.items():
            assert found[name][column] == pytest.approx(value), name


def test_a_column_without_a_value_is_undefined():
    """Nothing is called positive: there is no precision, and F1 is 0."""
    cases = prepare("classify", np.array([0, 1]), np.array([[0.9, 0.1], [0.8, 0.2]]), ("a", "b"))
    found = published_scores(cases, np.ones((2, 1)))
    assert np.isnan(found["precision"][0]) and found["f1"][0] == found["iou"][0] == 0
