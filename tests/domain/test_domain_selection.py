"""Validators that need no target labels, against hand-computed values and reference formulas."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from sklearn.metrics import mutual_info_score

from medtl_jax.domain import validators
from medtl_jax.domain.selection import (
    ORACLE,
    VALIDATORS,
    Evidence,
    Validator,
    choose,
    find_validator,
    measure,
    source_validator,
)
from medtl_jax.domain.validators import (
    controlled_risk,
    density_ratio,
    dev,
    distributions,
    entropy,
    infomax,
    sampled_rows,
    snd,
)
from medtl_jax.errors import UserError

ACCURACY = source_validator("accuracy", True)


def softmax_rows(n: int, k: int, seed: int = 0, scale: float = 2.0) -> np.ndarray:
    logits = scale * np.random.default_rng(seed).normal(size=(n, k))
    return scipy.special.softmax(logits, axis=1).astype(np.float32)


def reference_snd(rows: np.ndarray, temperature: float) -> float:
    """The whole matrix at once, its diagonal left out, in float64."""
    rows = rows.astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = unit @ unit.T / temperature
    others = similarity[~np.eye(len(rows), dtype=bool)].reshape(len(rows), -1)
    return float(scipy.stats.entropy(scipy.special.softmax(others, axis=1), axis=1).mean())


def test_entropy_by_hand():
    rows = np.array([[0.5, 0.5], [1.0, 0.0]])
    assert entropy(rows) == pytest.approx(math.log(2) / 2)
    assert entropy(np.full((3, 4), 0.25, np.float16)) == pytest.approx(math.log(4), abs=1e-6)


def test_infomax_is_the_mutual_information():
    # Joint distribution of three equally likely images and two classes.
    rows = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    counts = np.round(rows * 1000).astype(int)
    images = np.repeat(np.repeat(np.arange(3), 2), counts.ravel())
    classes = np.repeat(np.tile([0, 1], 3), counts.ravel())
    assert infomax(rows) == pytest.approx(mutual_info_score(images, classes), rel=1e-9)


def test_infomax_sees_that_all_images_are_called_the_same():
    collapsed = np.tile([1.0, 0.0, 0.0], (30, 1))
    sorted_out = np.eye(3)[np.arange(30) % 3]
    assert entropy(collapsed) == entropy(sorted_out) == 0
    assert infomax(collapsed) == pytest.approx(0, abs=1e-12)
    assert infomax(sorted_out) == pytest.approx(math.log(3))


@settings(max_examples=30)
@given(
    hnp.arrays(
        np.float64, st.tuples(st.integers(1, 9), st.integers(2, 5)), elements=st.floats(-9, 9)
    )
)
def test_entropy_and_infomax_lie_within_their_bounds(logits):
    rows = scipy.special.softmax(logits, axis=1)
    most = math.log(rows.shape[1]) + 1e-9
    assert 0 <= entropy(rows) <= most
    assert -1e-9 <= infomax(rows) <= most
    assert infomax(rows[::-1]) == pytest.approx(infomax(rows), abs=1e-12)


def test_findings_are_averaged():
    score = np.array([[0.5, 0.9], [0.5, 0.1]], np.float32)
    rows = distributions("multilabel", score)
    assert rows.shape == (2, 2, 2)
    binary = scipy.stats.entropy([0.1, 0.9])
    assert entropy(rows) == pytest.approx((math.log(2) + binary) / 2, rel=1e-6)
    assert infomax(rows) == pytest.approx((0 + math.log(2) - binary) / 2, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.05, 0.01, 1.0])
@pytest.mark.parametrize("shape", [(60, 3), (40, 17)])
def test_snd_matches_the_formula_on_the_whole_matrix(shape, temperature, monkeypatch):
    rows = softmax_rows(*shape)
    want = reference_snd(rows, temperature)
    assert snd(rows, temperature=temperature) == pytest.approx(want, rel=2e-5)
    # In blocks of seven rows, the last one of fewer.
    monkeypatch.setattr(validators, "_BLOCK", 7 * shape[0])
    assert snd(rows, temperature=temperature) == pytest.approx(want, rel=2e-5)


def test_snd_of_features_does_not_depend_on_their_length():
    features = np.random.default_rng(1).normal(size=(50, 8)).astype(np.float32)
    lengths = np.geomspace(1e-18, 1e25, 50, dtype=np.float32)[:, None]
    assert snd(features * lengths) == pytest.approx(reference_snd(features, 0.05), rel=2e-5)
    # Units that are all off have no direction: as near to one image as to another.
    features[0] = 0
    assert math.isfinite(snd(features))


def test_snd_by_hand():
    # Two tight clusters: four neighbours of nearly equal weight in one, one other in the other.
    rows = np.repeat(np.eye(2), [5, 2], axis=0)
    assert snd(rows) == pytest.approx((5 * math.log(4) + 2 * 0.0) / 7, abs=1e-5)
    assert snd(np.tile([0.5, 0.5], (9, 1))) == pytest.approx(math.log(8), abs=1e-5)
    assert math.isnan(snd(rows[:1]))


def test_snd_of_many_rows_is_that_of_a_fixed_draw():
    rows = softmax_rows(500, 4)
    chosen = sampled_rows(500, 200, 3)
    assert snd(rows, limit=200, seed=3) == snd(rows[chosen], limit=200)
    assert snd(rows, limit=200, seed=3) != snd(rows, limit=200, seed=4)


def test_rows_are_drawn_without_replacement_the_same_each_time():
    drawn = sampled_rows(1000, 100, 0)
    np.testing.assert_array_equal(drawn, sampled_rows(1000, 100, 0))
    assert len(set(drawn)) == 100 and (np.diff(drawn) > 0).all() and drawn[-1] < 1000
    assert (sampled_rows(1000, 100, 1) != drawn).any()
    np.testing.assert_array_equal(sampled_rows(7, 7, 0), np.arange(7))


def test_pixels_of_masks_are_drawn():
    score = softmax_rows(2 * 6 * 5, 3).reshape(2, 6, 5, 3).astype(np.float16)
    whole = distributions("segment", score)
    np.testing.assert_array_equal(whole, score.reshape(-1, 3).astype(np.float32))
    some = distributions("segment", score, limit=11, seed=2)
    np.testing.assert_array_equal(some, whole[sampled_rows(60, 11, 2)])
    assert some.dtype == np.float32
    with pytest.raises(ValueError, match="numbers without probabilities"):
        distributions("regress", score)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_that_diverged_has_no_value(value):
    rows = softmax_rows(6, 3)
    rows[2, 1] = value
    assert math.isnan(entropy(rows)) and math.isnan(infomax(rows)) and math.isnan(snd(rows))
    fine = np.ones((6, 3), np.float32)
    losses = np.array([1, 2, 3, 4, 5, value])
    assert math.isnan(dev(fine, fine, losses, fine))
    assert measure(Evidence(target_probabilities=rows), [VALIDATORS["snd"]]) == {"target_snd": None}


@pytest.mark.parametrize("rows", [np.zeros((0, 3)), np.ones(4), np.full((2, 2), 0.9)])
def test_what_is_no_distribution_is_refused(rows):
    with pytest.raises(ValueError, match="want probabilities"):
        entropy(rows)


def test_the_density_ratio_of_two_gaussians():
    # N(1, 1) over N(0, 1) is exp(x - 1/2), whatever the sizes of the domains are.
    rng = np.random.default_rng(0)
    source, target = rng.normal(0, 1, (4000, 1)), rng.normal(1, 1, (1000, 1))
    at = np.linspace(-1, 2, 7)[:, None]
    np.testing.assert_allclose(density_ratio(source, target, at), np.exp(at[:, 0] - 0.5), rtol=0.15)


def test_dev_estimates_the_target_risk():
    rng = np.random.default_rng(1)
    train, held_out = rng.normal(0, 1, (3000, 1)), rng.normal(0, 1, (3000, 1))
    target = rng.normal(1, 1, (3000, 1))
    # A loss of x^2 has the mean 1 on the source and 2 on the target.
    risk = dev(train, held_out, held_out[:, 0] ** 2, target)
    assert risk == pytest.approx(2.0, abs=0.25)
    assert (held_out**2).mean() == pytest.approx(1.0, abs=0.1)


def test_many_features_of_equal_domains_give_weights_near_one():
    # Without a penalty that fits, the odds of 150 features that say nothing are far from 1.
    rng = np.random.default_rng(4)
    source, target, at = rng.normal(size=(3, 200, 150))
    weights = density_ratio(source, target, at)
    assert weights.mean() == pytest.approx(1, abs=0.1) and weights.std() < 0.2


def test_dev_needs_some_images():
    rows = np.ones((12, 2))
    with pytest.raises(UserError, match=r"needs 10 .* there are 12 of the source and 9 of the tar"):
        dev(rows, rows, np.ones(12), rows[:9])


def test_the_control_variate_by_hand():
    losses, weights = np.array([1.0, 3.0]), np.array([0.5, 2.5])
    # w l = (0.5, 7.5), mean 4, deviations -+3.5; w deviates by -+1: eta = -3.5; mean w is 1.5.
    assert controlled_risk(losses, weights) == pytest.approx(4 - 3.5 * 0.5)
    # Weights alone that do not average to 1 do not change a loss that is the same everywhere.
    assert controlled_risk(np.full(3, 0.7), np.array([0.2, 0.5, 3.0])) == pytest.approx(0.7)
    assert controlled_risk(losses, np.array([1.0, 1.0])) == pytest.approx(2.0)


def test_dev_survives_domains_that_do_not_overlap():
    rng = np.random.default_rng(2)
    source, target = rng.normal(0, 0.01, (200, 5)), rng.normal(9, 0.01, (200, 5))
    assert math.isfinite(dev(source, source, rng.random(200), target))


def test_dev_wants_one_loss_an_image():
    rows = np.ones((3, 2))
    with pytest.raises(ValueError, match="3 features for losses"):
        dev(rows, rows, np.ones(2), rows)


def test_all_validators_at_once():
    rng = np.random.default_rng(3)
    rows, features = softmax_rows(30, 3), rng.normal(size=(30, 4))
    evidence = Evidence(rows, features, features + 1, features[:8], rng.random(8))
    found = measure(evidence, [ACCURACY, *VALIDATORS.values()])
    assert set(found) == {"target_entropy", "target_infomax", "target_snd", "target_dev"}
    assert found["target_entropy"] == entropy(rows)
    assert found["target_infomax"] == infomax(rows)
    assert found["target_snd"] == snd(rows)
    assert found["target_dev"] == dev(
        evidence.source_train_features,
        evidence.source_features,
        evidence.source_losses,
        evidence.target_features,
    )
    for validator in VALIDATORS.values():
        with pytest.raises(ValueError, match=f"{validator.name} needs {validator.needs[0]}"):
            measure(Evidence(), [validator])


def test_the_directions():
    better = {name: found.more_is_better for name, found in VALIDATORS.items()}
    assert better == {"entropy": False, "infomax": True, "snd": True, "dev": False}


RECORDS = [
    {"epoch": 1, "val_accuracy": 0.9, "target_entropy": 0.4, "oracle_accuracy": 0.99},
    {"epoch": 2, "val_accuracy": 0.95, "target_entropy": math.nan, "oracle_accuracy": 0.2},
    {"epoch": 3, "val_accuracy": 0.95, "target_entropy": 0.1, "oracle_accuracy": 0.3},
    {"epoch": 4, "val_accuracy": None, "target_entropy": 0.1, "oracle_accuracy": 0.4},
    {"epoch": 5, "val_accuracy": math.inf, "target_entropy": -math.inf, "oracle_accuracy": 0.5},
]


def test_the_best_record_is_the_earliest_finite_one():
    assert choose(RECORDS, ACCURACY)["epoch"] == 2
    assert choose(RECORDS, VALIDATORS["entropy"])["epoch"] == 3
    with pytest.raises(KeyError, match="target_snd"):
        choose(RECORDS, VALIDATORS["snd"])


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_no_finite_value_is_an_error(value):
    with pytest.raises(UserError, match=r"^the validator snd has no finite value in any of 2 "):
        choose([{"target_snd": value}] * 2, VALIDATORS["snd"])


@given(st.text(max_size=8), st.sampled_from([ORACLE, "Oracle", "ORACLE_", " oracle", "_oracle"]))
def test_nothing_can_be_chosen_by_target_labels(rest, start):
    for name, key in ((start + rest, "val_loss"), ("fine", start + rest)):
        with pytest.raises(ValueError, match="found with target labels"):
            Validator(name, key, True, "")
    with pytest.raises(UserError, match="choose from source, entropy, infomax, snd, dev"):
        find_validator(start + rest, ACCURACY, "classify")


def test_no_known_validator_is_an_oracle():
    for name, validator in {ACCURACY.name: ACCURACY, **VALIDATORS}.items():
        assert ORACLE not in validator.key and ORACLE not in name
        assert not any(ORACLE in need for need in validator.needs)
        # The choice is the same whatever the target labels say.
        records = [{validator.key: v, "oracle_accuracy": 1 - v} for v in (0.2, 0.8)]
        other = [{**record, "oracle_accuracy": 0.5} for record in records]
        chosen = records.index(choose(records, validator))
        assert chosen == other.index(choose(other, validator))


def test_validators_are_found_by_name():
    assert find_validator("source", ACCURACY, "regress") is ACCURACY
    assert find_validator("snd", ACCURACY, "segment") is VALIDATORS["snd"]
    assert find_validator("dev", ACCURACY, "classify") is VALIDATORS["dev"]
    with pytest.raises(UserError, match=r"^'oracle_dice' uses target labels, .*: choose from sour"):
        find_validator("oracle_dice", ACCURACY, "segment")
    with pytest.raises(UserError, match=r"needs probabilities, .*choose from source$"):
        find_validator("snd", ACCURACY, "regress")
    with pytest.raises(UserError, match=r"the log loss of one class an image, .* entropy, infom"):
        find_validator("dev", ACCURACY, "segment")
