"""What a task's outputs mean, its losses as configured, and the mistakes a user can make."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import sklearn.metrics
import sklearn.utils.class_weight

from configs import default
from medtl_jax.data.catalog import DataSpec
from medtl_jax.errors import UserError
from medtl_jax.objectives import losses, task
from medtl_jax.objectives.task import (
    Task,
    check_select,
    count_labels,
    make_task,
    make_terms,
    sampling_groups,
)

RNG = np.random.default_rng(0)
CLASSES = ("none", "mild", "severe")
TRAIN = default.get_config().train.to_dict()
LABELS = np.array([0, 2, 1, 1, 0, 2, 2], np.int32)
FINDINGS = np.array([[1, 0, -1], [0, 1, 1], [-1, 0, 0], [0, 0, 1]], np.int8)
NUMBERS = np.array([[1.0, 10.0, 5.0], [3.0, np.nan, 6.0], [5.0, 30.0, np.nan]], np.float32)
MASKS = RNG.integers(0, 3, (4, 6, 5)).astype(np.uint8)
TARGETS = {
    "classify": LABELS,
    "multilabel": FINDINGS,
    "ordinal": LABELS,
    "segment": MASKS,
    "regress": NUMBERS,
}


def made(name, target=None, ordinal="corn"):
    spec = DataSpec("set", name, CLASSES)
    return make_task(spec, TARGETS[name] if target is None else target, ordinal)


def drawn_logits(name):
    target = TARGETS[name]
    shape = target.shape if name in ("multilabel", "regress") else (*target.shape, 3)
    logits = np.random.default_rng(2).normal(0, 2, shape).astype(np.float32)
    return logits[..., :2] if name == "ordinal" else logits


def test_numbers_of_outputs():
    found = {name: made(name).outputs for name in TARGETS}
    assert found == {"classify": 3, "multilabel": 3, "ordinal": 2, "segment": 3, "regress": 3}


def test_scales_are_those_of_the_known_training_targets():
    found = made("regress")
    np.testing.assert_allclose(found.mean, [3, 20, 5.5])
    np.testing.assert_allclose(found.std, [math.sqrt(8 / 3), 10, 0.5])


def test_scores_of_numbers_are_in_their_own_units():
    found = made("regress").score(np.array([[0, 1, -2]], np.float32))
    np.testing.assert_allclose(found, [[3, 30, 4.5]])
    assert found.dtype == np.float32


def test_scores_are_the_probabilities_that_scipy_has():
    logits = drawn_logits("classify")
    found = made("classify").score(logits)
    np.testing.assert_allclose(found, scipy.special.softmax(logits, -1), rtol=1e-5)
    assert found.dtype == np.float32
    logits = drawn_logits("multilabel")
    found = made("multilabel").score(logits)
    np.testing.assert_allclose(found, scipy.special.expit(logits), rtol=1e-6)
    assert found.dtype == np.float32
    logits = drawn_logits("segment")
    found = made("segment").score(logits)
    np.testing.assert_allclose(found, scipy.special.softmax(logits, -1), atol=5e-4)
    assert found.dtype == np.float16 and found.shape == (4, 6, 5, 3)


def test_scores_of_ordered_classes_by_hand():
    # Steps taken with 1/2 and 3/4.
    logits = np.array([[0.0, np.log(3)]], np.float32)
    found = made("ordinal").score(logits)
    np.testing.assert_allclose(found, [[0.5, 0.125, 0.375]], rtol=1e-6)
    assert found.dtype == np.float32
    # The second threshold lies softplus(ln 3) = ln 4 lower: P(y > 1) = sigmoid(-ln 4) = 1/5.
    found = made("ordinal", ordinal="cumulative").score(logits)
    np.testing.assert_allclose(found, [[0.5, 0.3, 0.2]], rtol=1e-6)


@pytest.mark.parametrize("name", TARGETS)
def test_blocks_change_nothing(name, monkeypatch):
    one, logits, target = made(name), drawn_logits(name), TARGETS[name]
    whole, loss = one.score(logits), one.val_loss(logits, target)
    monkeypatch.setattr(task, "_BLOCK", 1)
    np.testing.assert_array_equal(one.score(logits), whole)
    assert one.val_loss(logits, target) == pytest.approx(loss, rel=1e-12)
    assert one.score(logits[:0]).shape == (0, *whole.shape[1:])


def test_validation_losses_equal_scikit_learn():
    logits = drawn_logits("classify")
    wanted = sklearn.metrics.log_loss(LABELS, scipy.special.softmax(logits, -1))
    assert made("classify").val_loss(logits, LABELS) == pytest.approx(wanted, rel=1e-5)

    one, logits = made("ordinal"), drawn_logits("ordinal")
    first, second = scipy.special.expit(logits.astype(np.float64)).T
    probability = np.stack([1 - first, first * (1 - second), first * second], axis=1)
    wanted = sklearn.metrics.log_loss(LABELS, probability)
    assert one.val_loss(logits, LABELS) == pytest.approx(wanted, rel=1e-5)

    logits, known = drawn_logits("multilabel"), FINDINGS >= 0
    wanted = sklearn.metrics.log_loss(FINDINGS[known], scipy.special.expit(logits)[known])
    assert made("multilabel").val_loss(logits, FINDINGS) == pytest.approx(wanted, rel=1e-5)

    logits = drawn_logits("segment")
    probability = scipy.special.softmax(logits, -1).reshape(-1, 3)
    wanted = sklearn.metrics.log_loss(MASKS.ravel(), probability)
    assert made("segment").val_loss(logits, MASKS) == pytest.approx(wanted, rel=1e-5)


def test_validation_loss_of_numbers_by_hand():
    one = Task("regress", ("age", "size"), mean=(10.0, 0.0), std=(2.0, 4.0))
    target = np.array([[12.0, np.nan], [np.nan, 8.0]], np.float32)
    # Standardised targets 1 and 2.
    logits = np.array([[1.5, 9.0], [9.0, 1.0]], np.float32)
    assert one.val_loss(logits, target) == pytest.approx((0.25 + 1) / 2)
    assert one.loss_sums(logits, target) == (pytest.approx(1.25), 2)
    assert math.isnan(one.val_loss(logits, np.full((2, 2), np.nan, np.float32)))


@pytest.mark.parametrize("name", TARGETS)
def test_outputs_of_another_shape_are_refused(name):
    logits = drawn_logits(name)
    with pytest.raises(ValueError, match="logits .* and target .* of " + name):
        made(name).val_loss(logits, TARGETS[name][:-1])
    with pytest.raises(ValueError, match="logits .* and target .* of " + name):
        made(name).val_loss(logits[..., :1], TARGETS[name])


def test_selection_by_errors_wants_less_of_them():
    assert Task("regress", ("age",), mean=(0.0,), std=(1.0,)).selection == {
        "loss": False,
        "mae": False,
        "mse": False,
        "rmse": False,
        "r2": True,
        "pearson": True,
    }
    for name, metric in (("classify", "auc"), ("multilabel", "auc"), ("segment", "dice")):
        assert made(name).selection["loss"] is False and made(name).selection[metric] is True
    found = made("ordinal").selection
    assert found["mae"] is False and found["quadratic_kappa"] is True


def test_several_targets_are_not_chosen_by_a_mean_of_unlike_units():
    two = Task("regress", ("age", "area"), mean=(0.0, 0.0), std=(1.0, 1.0))
    assert two.selection == {"loss": False, "r2": True, "pearson": True}
    check_select("mae", "regress")
    message = "'mae' is no value of the task regress of 2 targets, .*; choose from loss, r2, pearso"
    with pytest.raises(UserError, match=message):
        check_select("mae", "regress", 2)
    message = "'dice' is no value of the task regress; choose from loss, mae, mse, rmse, r2, pearso"
    with pytest.raises(UserError, match=message):
        check_select("dice", "regress")


def test_labels_are_counted_in_parts():
    target = np.zeros((130, 3), np.uint8)
    target[100:, 1] = 2
    assert count_labels(target, 4).tolist() == [360, 0, 30, 0]


@pytest.mark.parametrize("name", TARGETS)
def test_a_card_survives_json(name):
    one = made(name, ordinal="cumulative")
    assert Task.from_card(json.loads(json.dumps(one.to_card()))) == one


GOOD = {"name": "regress", "classes": ["age"], "ordinal": "corn", "mean": [1.0], "std": [2]}


@pytest.mark.parametrize(
    "change",
    [
        {"name": "detect"},
        {"name": ["regress"]},
        {"name": "segment", "mean": [], "std": []},
        {"ordinal": "other"},
        {"ordinal": None},
        {"classes": "age"},
        {"classes": [1]},
        {"classes": []},
        {"classes": ["age", "age"], "mean": [1.0, 1.0], "std": [1.0, 1.0]},
        {"mean": []},
        {"mean": [float("nan")]},
        {"mean": [True]},
        {"mean": ["1"]},
        {"mean": [10**400]},
        {"std": [0.0]},
        {"std": [-1.0]},
        {"std": [float("inf")]},
        {"std": 2.0},
        {"more": 1},
    ],
    ids=str,
)
def test_a_card_that_is_none_is_refused(change):
    assert Task.from_card(GOOD).std == (2.0,)
    with pytest.raises(ValueError):
        Task.from_card({**GOOD, **change})


@pytest.mark.parametrize("card", [None, [], "regress", {}])
def test_no_card_at_all_is_refused(card):
    with pytest.raises(ValueError, match="the card of a task must hold name, classes"):
        Task.from_card(card)


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("regress", [np.nan] * 3, "set: the target 'mild' is missing in every training image"),
        ("regress", [7.0, 7.0, np.nan], "the target 'mild' is 7 in every training image that has"),
        ("regress", [1.0, np.inf, 2.0], "the target 'mild' is infinite in a training image"),
        ("multilabel", [-1] * 4, "set: the finding 'mild' is missing in every training image"),
    ],
)
def test_targets_with_nothing_to_learn_are_named(name, column, message):
    target = TARGETS[name].copy()
    target[:, 1] = column
    with pytest.raises(UserError, match=message):
        made(name, target)


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        ("classify", ("cat",), "set: the task classify needs 2 or more names, .*are: 'cat'"),
        ("ordinal", (), "set: the task ordinal needs 2 or more names, .*are: none"),
        ("multilabel", ("a", "a", "b"), "multilabel needs 1 or more names, each once"),
    ],
)
def test_too_few_classes_and_repeated_ones_are_named(name, classes, message):
    target = TARGETS[name]
    with pytest.raises(UserError, match=message):
        make_task(DataSpec("set", name, classes), target, "corn")


def mean_loss(name, settings, ordinal="corn", output="logits", outputs=("logits",)):
    one, logits, target = made(name, ordinal=ordinal), drawn_logits(name), TARGETS[name]
    terms = make_terms(one, target, {**TRAIN, "ordinal": ordinal, **settings}, outputs)
    assert set(terms) == set(outputs)
    total, count = terms[output]({output: logits}, {"target": jnp.asarray(target)}, None, None)
    return float(total / count)


@pytest.mark.parametrize(
    ("name", "ordinal"),
    [("classify", "corn"), ("multilabel", "corn"), ("ordinal", "cumulative"), ("segment", "corn")],
)
def test_without_options_training_and_validation_losses_agree(name, ordinal):
    """The one written with JAX, the other with NumPy and SciPy."""
    options = {"dice": 0.0} if name == "segment" else {}
    wanted = made(name, ordinal=ordinal).val_loss(drawn_logits(name), TARGETS[name])
    assert mean_loss(name, options, ordinal) == pytest.approx(wanted, rel=1e-5)


def test_a_wide_huber_loss_is_half_the_squared_error():
    wanted = made("regress").val_loss(drawn_logits("regress"), NUMBERS) / 2
    assert mean_loss("regress", {"huber_delta": 100.0}) == pytest.approx(wanted, rel=1e-5)


def test_dice_is_added_with_its_weight():
    parts = [mean_loss("segment", {"dice": weight}) for weight in (0.0, 0.25, 1.0)]
    total, count = losses.soft_dice(3)(
        {"logits": drawn_logits("segment")}, {"target": jnp.asarray(MASKS)}, None, None
    )
    dice = float(total / count)
    assert parts[1] - parts[0] == pytest.approx(0.25 * dice, rel=1e-4)
    assert parts[2] - parts[0] == pytest.approx(dice, rel=1e-5)


def test_logit_adjustment_uses_the_training_prior():
    prior = np.array([2, 2, 3]) / 7
    logits = drawn_logits("classify") + 1.5 * np.log(prior)
    wanted = sklearn.metrics.log_loss(LABELS, scipy.special.softmax(logits, -1))
    assert mean_loss("classify", {"logit_adjustment": 1.5}) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", TARGETS)
def test_auxiliary_heads_get_the_same_loss(name):
    outputs = ("logits", "aux1")
    assert mean_loss(name, {}, output="aux1", outputs=outputs) == mean_loss(name, {})


CHANGED = {
    "label_smoothing": (0.1, ("classify", "segment")),
    "class_weights": ("balanced", ("classify", "multilabel", "ordinal", "segment")),
    "sampling": ("balanced", ("classify", "ordinal")),
    "focal_gamma": (2.0, ("classify", "multilabel", "segment")),
    "logit_adjustment": (1.0, ("classify",)),
    "ordinal": ("cumulative", ("ordinal",)),
    "dice": (0.5, ("segment",)),
    "huber_delta": (2.0, ("regress",)),
}
BALANCED = {**TARGETS, "multilabel": np.array([[1, 0, 1], [0, 1, 0], [0, 1, 0]], np.int8)}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("option", CHANGED)
def test_an_option_is_used_or_refused(option, name):
    value, tasks = CHANGED[option]
    settings = {**TRAIN, option: value}
    one = made(name, BALANCED[name], settings["ordinal"])
    if name in tasks:
        assert set(make_terms(one, BALANCED[name], settings)) == {"logits"}
    else:
        with pytest.raises(UserError, match=rf"train\.{option}={value} means nothing for the task"):
            make_terms(one, BALANCED[name], settings)


def test_the_defaults_of_the_configuration_suit_every_task():
    for name in TARGETS:
        task.check_options(name, TRAIN)


def test_balanced_weights_equal_scikit_learn():
    wanted = sklearn.utils.class_weight.compute_class_weight(
        "balanced", classes=np.arange(3), y=LABELS
    )
    found = task.class_weights(LABELS, CLASSES, "balanced")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_array_equal(task.class_weights(LABELS, [*CLASSES, "x"], "none"), np.ones(4))


def test_balanced_weights_of_pixels_equal_scikit_learn(monkeypatch):
    monkeypatch.setattr(task, "_READ", 3)
    wanted = sklearn.utils.class_weight.compute_class_weight(
        "balanced", classes=np.arange(3), y=MASKS.ravel()
    )
    np.testing.assert_allclose(task.class_weights(MASKS, CLASSES, "balanced"), wanted, rtol=1e-6)


def test_balanced_weights_of_findings_by_hand():
    target = np.array([[1, 0, 1], [0, 1, 0], [0, 1, -1], [0, 1, 1]], np.int8)
    found = task.positive_weights(target, CLASSES, "balanced")
    np.testing.assert_allclose(found, [3, 1 / 3, 0.5], rtol=1e-6)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(task.positive_weights(target, CLASSES, "none"), np.ones(3))


def test_mistakes_of_class_weights_are_named():
    for weights, target in ((task.class_weights, LABELS), (task.positive_weights, FINDINGS)):
        with pytest.raises(UserError, match=r"train.class_weights='even' is not known; choose"):
            weights(target, CLASSES, "even")
    with pytest.raises(UserError, match=r"training images of every class; 'extra' has none"):
        task.class_weights(LABELS, (*CLASSES, "extra"), "balanced")
    never = FINDINGS.copy()
    never[:, 1] = [0, 0, -1, 0]
    with pytest.raises(UserError, match=r"'mild' is known present in 0 and known absent in 3"):
        task.positive_weights(never, CLASSES, "balanced")


def test_logit_adjustment_needs_every_class():
    one = made("classify", ordinal="corn")
    with pytest.raises(UserError, match=r"train.logit_adjustment needs .* 'severe' has none"):
        make_terms(one, np.array([0, 1], np.int32), {**TRAIN, "logit_adjustment": 1.0})


def test_groups_to_sample_are_the_classes():
    for name in ("classify", "ordinal"):
        found = sampling_groups(made(name), LABELS, "balanced")
        np.testing.assert_array_equal(found, LABELS)
    for name in TARGETS:
        assert sampling_groups(made(name), TARGETS[name], "uniform") is None


def test_mistakes_of_sampling_are_named():
    for name in ("multilabel", "segment", "regress"):
        with pytest.raises(UserError, match=f"train.sampling=balanced means nothing .* {name}"):
            sampling_groups(made(name), TARGETS[name], "balanced")
    with pytest.raises(UserError, match=r"train.sampling='often' is not known; choose 'uniform'"):
        sampling_groups(made("classify"), LABELS, "often")
    with pytest.raises(UserError, match="every class; 'severe' has none"):
        sampling_groups(made("classify"), np.array([0, 1, 1], np.int32), "balanced")
