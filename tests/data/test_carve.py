"""Parts carved from a set: whole patients, classes in proportion."""

import numpy as np
import pytest

from medtl_jax.data.carve import carve


def test_carving_keeps_patients_whole_and_classes_balanced():
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 150, 600)
    labels = np.where(patients % 3 == 0, "ill", "well")
    chosen = carve(labels.tolist(), patients.astype(str).tolist(), 0.15, seed=0)
    kept = np.setdiff1d(np.arange(600), chosen)
    assert not set(patients[chosen]) & set(patients[kept])
    assert abs(len(chosen) / 600 - 0.15) < 0.02
    assert abs((labels[chosen] == "ill").mean() - (labels == "ill").mean()) < 0.04
    again = carve(labels.tolist(), patients.astype(str).tolist(), 0.15, seed=0)
    np.testing.assert_array_equal(chosen, again)
    assert not np.array_equal(chosen, carve(labels.tolist(), patients.tolist(), 0.15, seed=1))


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.9])
def test_carved_fraction(fraction):
    labels, patients = ["a", "b"] * 100, [str(n // 2) for n in range(200)]
    for groups in (None, patients):
        assert len(carve(labels, groups, fraction, seed=3)) == pytest.approx(200 * fraction, abs=4)


def test_a_rare_class_does_not_change_the_fraction():
    labels, patients = ["a"] * 2 + ["b"] * 100 + ["c"] * 100, [str(n) for n in range(202)]
    taken = [carve(labels, patients, 0.15, seed, every_class=False) for seed in range(3)]
    assert all(abs(len(rows) - 30) <= 2 for rows in taken)
    # Where every class is that rare, the fraction gives way, and the classes stay in proportion.
    labels, patients = ["a", "b"] * 4, [str(n) for n in range(8)]
    rows = carve(labels, patients, 0.15, 0)
    assert sorted(labels[row] for row in rows) == ["a", "b"]


def test_carving_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="one patient"):
        carve(["a", "b"] * 5, ["p"] * 10, 0.2, seed=0)
    # All images of class "a" are of one patient: whichever fold has it takes the class.
    labels, patients = ["a"] * 3 + ["b"] * 9, ["p"] * 3 + [str(n) for n in range(9)]
    outcomes = []
    for seed in range(8):
        try:
            outcomes.append(len(carve(labels, patients, 0.34, seed)) < 12)
        except ValueError as error:
            outcomes.append("every image of class 'a'" in str(error))
    assert all(outcomes)
