"""Splits drawn from one table: whole patients, strata in proportion, seeded, a partition in k."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medtl_jax.data.carve import HeldOut, draw_test
from medtl_jax.data.readers import load_dataset
from medtl_jax.data.strata import fewest, pool_rare, strata
from medtl_jax.errors import UserError

SPLITS = ("train", "val", "test")

# ---- strata ------------------------------------------------------------------------------------


def test_strata_by_hand():
    labels = np.array([1, 0, 1], np.int32)
    assert strata("classify", labels, ("a", "b"), 3) == ["b", "a", "b"]
    assert strata("ordinal", labels, ("low", "high"), 3) == ["high", "low", "high"]
    assert strata("segment", None, ("background", "lesion"), 2) == ["", ""]
    # Positives: x 3, y 1, z 2. Unknown labels are no findings.
    findings = np.array([[1, 0, 1], [1, 1, 1], [1, -1, -1], [0, -1, 0]], np.int8)
    assert strata("multilabel", findings, ("x", "y", "z"), 4) == ["z", "y", "x", ""]
    # Columns in another order give the same strata, also where two are equally rare.
    tied = findings[:3, [1, 0, 2]]
    assert strata("multilabel", tied, ("y", "x", "z"), 3) == ["z", "y", "x"]


def test_numbers_are_put_into_bins_of_equal_counts():
    values = np.random.default_rng(0).permutation(np.arange(200.0) ** 2)[:, None]
    counts = Counter(strata("regress", values, ("v",), 200))
    assert counts == {str(k): 20 for k in range(10)}
    values[values < 100] = np.nan  # 0..9 squared
    counts = Counter(strata("regress", values, ("v",), 200))
    assert counts.pop("unknown") == 10 and sum(counts.values()) == 190 and len(counts) == 9
    few = np.arange(12.0)[:, None]
    assert set(strata("regress", few, ("v",), 12)) == {"0"}
    assert strata("regress", np.full((2, 1), np.nan), ("v",), 2) == ["unknown"] * 2


def test_rare_strata_are_pooled():
    labels = ["a"] * 5 + ["b"] * 2 + ["c"] * 2 + ["d"] * 9
    pooled = ["a"] * 5 + ["b + c"] * 4 + ["d"] * 9
    assert pool_rare(labels, 2) == labels and pool_rare(labels, 4) == pooled
    # b + c is too small itself and joins a, the smallest of the others.
    assert pool_rare(labels, 5) == ["b + c + a"] * 9 + ["d"] * 9
    assert len(set(pool_rare(labels, 100))) == 1
    assert [fewest(part) for part in (0.2, 0.15, 0.5, 0.9)] == [5, 7, 2, 10]


# ---- the draw ----------------------------------------------------------------------------------

TABLES = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 30).map(str)), min_size=8, max_size=60
)


@settings(max_examples=60)
@given(TABLES, st.integers(2, 6), st.integers(0, 2**32 - 1), st.booleans())
def test_folds_are_a_partition_of_whole_patients(rows, folds, seed, grouped):
    labels, patients = (list(column) for column in zip(*rows, strict=True))
    groups = patients if grouped else None
    if grouped and len(set(patients)) < folds:
        with pytest.raises(ValueError, match=f"patients are too few for {folds} folds"):
            draw_test(labels, groups, HeldOut(folds=folds, seed=seed))
        return
    parts = []
    for fold in range(folds):
        try:
            parts.append(draw_test(labels, groups, HeldOut(folds=folds, fold=fold, seed=seed)))
        except ValueError as error:
            assert grouped and f"fold {fold} has no images" in str(error)
            parts.append(np.empty(0, np.int64))
    assert np.sort(np.concatenate(parts)).tolist() == list(range(len(rows)))
    homes = [{patients[row] for row in part} for part in parts]
    if grouped:
        assert sum(map(len, homes)) == len(set(patients))
    else:
        assert max(map(len, parts)) - min(map(len, parts)) <= len(set(labels))


def test_folds_hold_every_class_in_proportion():
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 120, 600)
    labels = np.where(patients % 4 == 0, "ill", "well").tolist()
    for fold in range(5):
        test = draw_test(labels, patients.astype(str).tolist(), HeldOut(folds=5, fold=fold))
        assert abs(len(test) - 120) < 25
        assert abs(np.mean([labels[row] == "ill" for row in test]) - 0.25) < 0.08


# ---- a csv without a split column --------------------------------------------------------------


def table(root, target, count=80, per_patient=2):
    """A csv of `count` images of one patient each two; `target(number)` is its label."""
    lines = ["path,label,who"]
    for number in range(count):
        path = root / f"{number:03d}.png"
        Image.fromarray(np.full((2, 2), number, np.uint8)).save(path)
        lines.append(f"{path.name},{target(number // per_patient)},p{number // per_patient}")
    (root / "list.csv").write_text("\n".join(lines))
    return {
        "name": "csv",
        "dir": str(root / "list.csv"),
        "csv_split_column": "",
        "csv_patient_column": "who",
    }


def homes(dataset):
    return {name: set(dataset.splits[name].ids.tolist()) for name in dataset.splits}


def refusal(config, **options):
    with pytest.raises(UserError) as caught:
        load_dataset(config, 2, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_three_splits_of_whole_patients(tmp_path):
    config = table(tmp_path, lambda patient: "ab"[patient % 4 == 0])
    dataset = load_dataset(config | {"val_fraction": 0.25}, 2)
    found = homes(dataset)
    assert [len(found[name]) for name in SPLITS] == [48, 16, 16]
    assert len(set.union(*found.values())) == 80
    patients = [set(dataset.splits[name].patients.tolist()) for name in SPLITS]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 40
    for name, share in zip(SPLITS, (12, 4, 4), strict=True):
        assert (dataset.splits[name].target == 1).sum() == share
        pixels = dataset.splits[name].images[:, 0, 0, 0]
        assert [f"{value:03d}.png" for value in pixels] == dataset.splits[name].ids.tolist()
    assert dataset.spec.notes == (
        "test: 16 of the 80 images, stratified by class, whole patients, seed 0",
        "val: 16 of the 64 train images, stratified by class, whole patients",
    )
    assert homes(load_dataset(config | {"val_fraction": 0.25}, 2)) == found
    other = load_dataset(config | {"val_fraction": 0.25, "seed_split": 1}, 2)
    assert homes(other)["test"] != found["test"]


@pytest.mark.parametrize("task", ["classify", "ordinal", "multilabel", "regress"])
def test_the_order_of_the_rows_does_not_matter(tmp_path, task):
    target = (lambda patient: patient % 3) if task == "ordinal" else (lambda patient: patient % 2)
    config = table(tmp_path, target) | {"seed_split": 3}
    first = load_dataset(config, 2, task=task)
    path = tmp_path / "list.csv"
    header, *rows = path.read_text().splitlines()
    shuffled = [rows[k] for k in np.random.default_rng(0).permutation(len(rows))]
    path.write_text("\n".join([header, *shuffled]))
    again = load_dataset(config, 2, task=task)
    assert again.checksum() == first.checksum() and first.spec.task == task


def test_folds_of_a_csv(tmp_path):
    config = table(tmp_path, lambda patient: "abc"[patient % 3]) | {"folds": 4}
    tests = []
    for fold in range(4):
        dataset = load_dataset(config | {"fold": fold}, 2)
        found = homes(dataset)
        assert len(set.union(*found.values())) == sum(map(len, found.values())) == 80
        assert dataset.spec.notes[0].startswith(f"test: fold {fold} of 4, {len(found['test'])} of")
        tests.append(found["test"])
        scored = load_dataset(config | {"fold": fold}, 2, classes=("a", "b", "c"), splits=("test",))
        assert homes(scored) == {"test": found["test"]}
    assert sum(map(len, tests)) == len(set.union(*tests)) == 80


def test_numbers_and_findings_are_in_proportion(tmp_path):
    config = table(tmp_path, lambda patient: (patient * 7) % 40, count=160, per_patient=4)
    numbers = load_dataset(config, 2, task="regress")
    means = [split.target.mean() for split in numbers.splits.values()]
    assert max(means) - min(means) < 5  # the standard deviation is 11.5
    assert "stratified by the first target, whole patients" in numbers.spec.notes[0]
    rare = table(tmp_path, lambda patient: int(patient % 8 == 0), count=160, per_patient=1)
    findings = load_dataset(rare, 2, task="multilabel")
    train, val, test = ((findings.splits[name].target == 1).sum() for name in SPLITS)
    # A fifth of the 20, then 15 percent of the other 16.
    assert test == 4 and val in (2, 3) and train + val == 16
    assert "stratified by the rarest finding" in findings.spec.notes[0]


def test_masks_are_divided_at_random(tmp_path):
    config = table(tmp_path, lambda patient: 0)
    for number in range(80):
        Image.fromarray(np.eye(2, dtype=bool)).save(tmp_path / f"{number:03d}.png")
    dataset = load_dataset(config | {"csv_mask_column": "path"}, 2)
    train, val, test = (len(dataset.splits[name]) for name in SPLITS)
    assert test == 16 and 8 <= val <= 12 and train + val == 64
    assert "16 of the 80 images, at random, whole patients, seed 0" in dataset.spec.notes[0]


def test_per_class_draws_from_train(tmp_path):
    config = table(tmp_path, lambda patient: "ab"[patient % 2]) | {"per_class": 8}
    whole, drawn = (load_dataset(config | {"per_class": count}, 2) for count in (0, 8))
    assert homes(whole)["test"] == homes(drawn)["test"]
    labels = [label for name in ("train", "val") for label in drawn.splits[name].target.tolist()]
    assert Counter(labels) == {0: 8, 1: 8}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"folds": 1}, "data.folds=1 leaves nothing"),
        ({"folds": 3, "fold": 3}, "data.fold must be an integer from 0 to 2"),
        ({"folds": 41}, "40 patients are too few for 41 folds"),
        ({"folds": 3, "csv_split_column": "split"}, "data.csv_split_column=''"),
        ({"test_fraction": 0}, "data.test_fraction must lie between 0 and 1"),
        ({"test_fraction": "a"}, "data.test_fraction must lie between 0 and 1"),
    ],
)
def test_mistakes(tmp_path, change, words):
    config = table(tmp_path, lambda patient: "ab"[patient % 2])
    assert words in refusal(config | change)


def test_a_class_that_is_in_test_alone(tmp_path):
    config = table(tmp_path, lambda patient: "ab"[patient == 0], count=20)
    messages = []
    for fold in range(10):
        try:
            load_dataset(config | {"folds": 10, "fold": fold, "val_fraction": 0.3}, 2)
        except UserError as error:
            messages.append(str(error))
    assert any("class 'b' has no image in the split train" in message for message in messages)
    config = table(tmp_path, lambda patient: "ab"[patient % 2], count=4, per_patient=4)
    assert "cannot take a test split from 4 images" in refusal(config)
