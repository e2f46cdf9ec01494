""".npz files of every task, MedMNIST's words for its tasks, and the phantom's tasks."""

import hashlib

import numpy as np
import pytest

from medtl_jax.data import medmnist, phantom_tasks
from medtl_jax.data.catalog import TASKS
from medtl_jax.data.phantom import make_phantom
from medtl_jax.data.readers import load_dataset
from medtl_jax.errors import UserError

SPLITS = ("train", "val", "test")


def arrays(labels, count=12, shape=(4, 4), splits=SPLITS):
    """A file's arrays; `labels(rng, count)` are those of a split."""
    rng = np.random.default_rng(0)
    made = {}
    for split in splits:
        made[f"{split}_images"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        made[f"{split}_labels"] = labels(rng, count)
    return made


def saved(root, made, name="x.npz"):
    np.savez(root / name, **made)
    return {"name": "npz", "dir": str(root / name)}


def refusal(config, size=4, **options):
    with pytest.raises(UserError) as caught:
        load_dataset(config, size, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- findings ----------------------------------------------------------------------------------


def findings(rng, count):
    return rng.integers(0, 2, (count, 3)).astype(np.uint8)


@pytest.mark.parametrize("dtype", ["u1", "?", "f4", "i8"])
def test_several_columns_are_findings(tmp_path, dtype):
    made = arrays(lambda rng, count: findings(rng, count).astype(dtype))
    dataset = load_dataset(saved(tmp_path, made), 4)
    assert dataset.spec.task == "multilabel" and dataset.spec.classes == ("0", "1", "2")
    for split in SPLITS:
        target = dataset.splits[split].target
        assert target.dtype == np.int8
        np.testing.assert_array_equal(target, made[f"{split}_labels"])
    named = load_dataset(saved(tmp_path, made) | {"classes": "a,b,c"}, 4)
    assert named.spec.classes == ("a", "b", "c")


def test_nan_is_an_unknown_finding(tmp_path):
    made = arrays(lambda rng, count: findings(rng, count).astype(np.float32))
    made["val_labels"][1, 2] = np.nan
    target = load_dataset(saved(tmp_path, made), 4).splits["val"].target
    assert target[1, 2] == -1 and (target != -1).sum() == target.size - 1
    made["train_labels"][:, 1] = np.nan
    config = saved(tmp_path, made)
    assert "'1' is missing for every image of the split train" in refusal(config)
    assert load_dataset(config, 4, classes=("a", "b", "c")).spec.classes == ("a", "b", "c")
    made["test_labels"][:] = np.nan
    message = refusal(saved(tmp_path, made))
    assert "0, 1, 2 are missing for every image of the split test" in message


def test_val_of_findings_is_carved(tmp_path):
    made = arrays(findings, count=60, splits=("train", "test"))
    dataset = load_dataset(saved(tmp_path, made), 4)
    assert len(dataset.splits["train"]) + len(dataset.splits["val"]) == 60
    assert "stratified by the rarest finding" in dataset.spec.notes[0]
    rows = [int(name[-6:]) for name in dataset.splits["val"].ids]
    np.testing.assert_array_equal(dataset.splits["val"].target, made["train_labels"][rows])


# ---- numbers and grades ------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [(), (1,), (2,)])
def test_numbers(tmp_path, columns):
    made = arrays(lambda rng, count: rng.normal(50, 9, (count, *columns)))
    made["test_labels"][0] = np.nan
    dataset = load_dataset(saved(tmp_path, made), 4, task="regress")
    k = columns[0] if columns else 1
    assert dataset.spec.task == "regress" and len(dataset.spec.classes) == k
    for split in SPLITS:
        target = dataset.splits[split].target
        assert target.dtype == np.float32 and target.shape == (12, k)
        expected = made[f"{split}_labels"].reshape(12, k).astype(np.float32)
        np.testing.assert_array_equal(target, expected)


def test_integers_are_numbers_or_grades_where_asked_for(tmp_path):
    config = saved(tmp_path, arrays(lambda rng, count: np.arange(count) % 3))
    assert load_dataset(config, 4).spec.task == "classify"
    grades = load_dataset(config | {"classes": "low,mid,high"}, 4, task="ordinal")
    assert grades.spec.task == "ordinal" and grades.spec.classes == ("low", "mid", "high")
    assert grades.splits["val"].target.tolist() == [0, 1, 2] * 4
    numbers = load_dataset(config, 4, task="regress")
    assert numbers.splits["val"].target[:, 0].tolist() == [0, 1, 2] * 4


@pytest.mark.parametrize(
    ("labels", "task", "words"),
    [
        (np.zeros((12, 3)), "classify", "(12, 3) (shapes of task=multilabel); task=classify"),
        (np.zeros((12, 4, 4), int), "regress", "(shapes of task=segment); task=regress takes [n]"),
        (np.zeros((12, 4, 4, 1), int), "segment", "task=segment takes [n, h, w]"),
        (np.zeros(12), "", "must be integers, not float64 (task=regress predicts numbers)"),
        (np.zeros((12, 4, 4)), "", "must be integers, not float64"),
        (np.array(["a"] * 12), "regress", "must be numbers"),
        (np.full((12, 2), 2), "", "has the value 2: findings are 0, 1"),
        (np.full((12, 2), -1), "", "has the value -1: findings are 0, 1"),
        (np.full(12, np.inf), "regress", "infinite or beyond float32"),
        (np.full(12, 1e39), "regress", "infinite or beyond float32"),
        (np.full((12, 4, 4), -1), "", "train_labels has the values -1, which are neither"),
        (np.full((12, 4, 4), 256), "", "train_labels has the values 256, which are neither"),
        (np.zeros((12, 4, 4), int), "", "every pixel of the masks of the split train is 'backgr"),
        (np.arange(12 * 36).reshape(12, 6, 6), "", "masks of 6 x 6 and their images 4 x 4"),
        (np.arange(12 * 16).reshape(12, 4, 4) * 2, "", "has the values 0, 2, 4, 6, 8, 10, ..., w"),
        (np.zeros((12, 5, 4), int), "", "masks of 5 x 4 and their images 4 x 4"),
    ],
)
def test_mistakes_in_labels(tmp_path, labels, task, words):
    assert words in refusal(saved(tmp_path, arrays(lambda rng, count: labels)), task=task)


def test_columns_must_agree(tmp_path):
    made = arrays(findings)
    made["val_labels"] = made["val_labels"][:, :2]
    assert "val_labels has 2 columns and train_labels 3" in refusal(saved(tmp_path, made))
    made = arrays(findings)
    assert "3 columns for the 2 names a, b" in refusal(saved(tmp_path, made) | {"classes": "a,b"})


# ---- masks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("white", [1, 255])
def test_planes_are_masks(tmp_path, white):
    made = arrays(lambda rng, count: rng.integers(0, 2, (count, 4, 4)).astype(np.uint8) * white)
    dataset = load_dataset(saved(tmp_path, made), 4)
    assert dataset.spec.task == "segment" and dataset.spec.classes == ("background", "foreground")
    target = dataset.splits["val"].target
    np.testing.assert_array_equal(target, made["val_labels"] // white)
    small = load_dataset(saved(tmp_path, made), 2).splits["val"].target
    np.testing.assert_array_equal(small, target[:, 1::2, 1::2])


def test_masks_of_more_classes(tmp_path):
    made = arrays(lambda rng, count: rng.integers(0, 3, (count, 4, 4)))
    dataset = load_dataset(saved(tmp_path, made), 4)
    assert dataset.spec.classes == ("0", "1", "2")
    assert dataset.splits["train"].target.dtype == np.uint8
    assert "2 classes need 0 to 1" in refusal(saved(tmp_path, made) | {"classes": "a,b"})
    # The classes are those of train, and no other split may have more.
    made["test_labels"][0, 0, 0] = 3
    message = refusal(saved(tmp_path, made))
    assert "test_labels cannot be used as masks: its values are 0, 1, 2, 3: 3 classes" in message


@pytest.mark.parametrize(("high", "void"), [(2, 255), (3, 255), (3, 4), (2, 3)])
def test_a_value_for_pixels_without_a_label_is_no_class(tmp_path, high, void):
    made = arrays(lambda rng, count: rng.integers(0, high, (count, 4, 4)).astype(np.uint8))
    made["train_labels"][3, 1, 2] = void
    config = saved(tmp_path, made)
    shown = ", ".join(map(str, [*range(high), void]))
    message = refusal(config)
    assert f"train_labels has the values {shown}, which are neither" in message
    assert "in data.classes" in message
    named = config | {"classes": ",".join("abc"[:high])}
    assert "train_labels cannot be used as masks" in refusal(named)


def test_masks_with_a_gap_are_read_where_their_classes_are_named(tmp_path):
    made = arrays(lambda rng, count: rng.integers(0, 2, (count, 4, 4)).astype(np.uint8) * 2)
    assert "has the values 0, 2, which are neither" in refusal(saved(tmp_path, made))
    dataset = load_dataset(saved(tmp_path, made) | {"classes": "none,rim,cup"}, 4)
    np.testing.assert_array_equal(dataset.splits["test"].target, made["test_labels"])
    assert "train has no pixel of rim" in dataset.spec.notes


def test_resized_masks_are_noted(tmp_path):
    made = arrays(
        lambda rng, count: rng.integers(0, 2, (count, 4, 6)).astype(np.uint8), shape=(4, 6)
    )
    notes = load_dataset(saved(tmp_path, made), 4).spec.notes
    assert any(note.startswith("masks of 6 x 4 pixels (width x height) are") for note in notes)
    made = arrays(lambda rng, count: rng.integers(0, 2, (count, 4, 4)).astype(np.uint8))
    assert load_dataset(saved(tmp_path, made), 4).spec.notes == ()


def test_val_may_not_take_all_that_is_known_of_a_number(tmp_path):
    labels = np.full((40, 2), np.nan, np.float32)
    labels[:, 0] = np.arange(40)
    labels[3, 1] = 1
    config = saved(tmp_path, arrays(lambda rng, count: labels, 40, splits=("train", "test")))
    taken = 0
    for seed in range(30):
        try:
            dataset = load_dataset(config | {"seed_split": seed}, 4, task="regress")
        except UserError as error:
            assert "data.val_fraction took all known values of '1' from train" in str(error)
            taken += 1
        else:
            assert np.isfinite(dataset.splits["train"].target[:, 1]).sum() == 1
    assert 0 < taken < 30


# ---- MedMNIST ----------------------------------------------------------------------------------


def published(monkeypatch, root, flag, made):
    """The set `flag` with the MD5 of a file of these arrays."""
    saved(root, made, f"{flag}.npz")
    md5 = hashlib.md5((root / f"{flag}.npz").read_bytes()).hexdigest()
    known = medmnist.TABLE[flag]
    changed = medmnist.MedMnistSet(known.classes, known.task, known.licence, (md5, *known.md5[1:]))
    monkeypatch.setitem(medmnist.TABLE, flag, changed)
    return {"name": f"medmnist/{flag}", "dir": str(root)}


def test_chestmnist_has_findings(tmp_path, monkeypatch):
    made = arrays(lambda rng, count: rng.integers(0, 2, (count, 14)).astype(np.uint8))
    config = published(monkeypatch, tmp_path, "chestmnist", made)
    dataset = load_dataset(config, 4)
    assert dataset.spec.task == "multilabel" and dataset.spec.classes[13] == "hernia"
    np.testing.assert_array_equal(dataset.splits["test"].target, made["test_labels"])
    assert "is for task=multilabel, not classify" in refusal(config, task="classify")
    as_npz = load_dataset({"name": "npz", "dir": str(tmp_path / "chestmnist.npz")}, 4)
    assert as_npz.spec.classes == dataset.spec.classes


def test_retinamnist_has_grades_or_classes(tmp_path, monkeypatch):
    made = arrays(lambda rng, count: (np.arange(count) % 5)[:, None].astype(np.uint8))
    config = published(monkeypatch, tmp_path, "retinamnist", made)
    classes, grades = (load_dataset(config, 4, task=task) for task in ("", "ordinal"))
    assert classes.spec.task == "classify" and "see task=ordinal" in classes.spec.notes[0]
    assert grades.spec.task == "ordinal" and grades.spec.notes == ()
    assert grades.spec.classes == classes.spec.classes
    assert "is for task=classify or ordinal" in refusal(config, task="regress")
    assert "are not the classes of medmnist/retinamnist" in refusal(config | {"classes": "a,b"})
    as_npz = {"name": "npz", "dir": str(tmp_path / "retinamnist.npz")}
    assert load_dataset(as_npz, 4, task="regress").spec.classes == ("0",)


def test_other_sets_have_no_order():
    assert "is for task=classify, not ordinal" in refusal(
        {"name": "medmnist/bloodmnist"}, task="ordinal"
    )


# ---- the phantom -------------------------------------------------------------------------------

PHANTOM = {"name": "phantom", "phantom": {"train": 90, "val": 4, "test": 4}}


@pytest.fixture(scope="module")
def phantoms():
    plain = load_dataset(PHANTOM, 32)
    return {task: phantom_tasks.retarget(plain, task, 0) for task in TASKS}


def test_the_phantoms_images_are_those_of_every_task(phantoms):
    plain = phantoms["classify"]
    for task, dataset in phantoms.items():
        assert dataset.spec.task == task and dataset.spec.classes == phantom_tasks.CLASSES[task]
        for name, split in dataset.splits.items():
            np.testing.assert_array_equal(split.images, plain.splits[name].images)
            np.testing.assert_array_equal(split.ids, plain.splits[name].ids)


def test_the_phantoms_targets_follow_from_what_is_known(phantoms):
    plain = phantoms["classify"].splits["train"]
    target = {task: dataset.splits["train"].target for task, dataset in phantoms.items()}
    mask, area = plain.extra["mask"], plain.extra["size"]
    np.testing.assert_array_equal(target["segment"], mask)
    assert target["regress"].dtype == np.float32
    # 32 pixels show 256 mm: 64 mm^2 a pixel.
    assert target["regress"][:, 0].tolist() == (mask.sum((1, 2)) * 64.0).tolist()
    for grade, (low, high) in enumerate([(0, 0), (1, 1349), (1350, 1749), (1750, 9999)]):
        found = area[target["ordinal"] == grade]
        assert len(found) >= 10 and ((low <= found) & (found <= high)).all()
    kind = np.array(phantoms["classify"].spec.classes)[plain.target]
    expected = np.stack(
        [kind != "normal", np.isin(kind, ["nodule", "infiltrate"]), area >= 1550], axis=1
    )
    found = target["multilabel"]
    known = found != -1
    np.testing.assert_array_equal(found[known], expected[known])
    # Binomial with n = 270, p = 0.1: standard deviation 4.9.
    assert abs((~known).sum() - 27) < 20 and found.dtype == np.int8


def test_unknown_labels_are_those_of_the_slice(phantoms):
    sizes = {"train": 20, "val": 4, "test": 4}
    plain = load_dataset({"name": "phantom", "phantom": sizes}, 32)
    assert plain.checksum() == make_phantom(32, **sizes).checksum()
    fewer = load_dataset({"name": "phantom", "phantom": sizes}, 32, task="multilabel")
    whole = phantoms["multilabel"].splits["train"].target
    np.testing.assert_array_equal(fewer.splits["train"].target, whole[:20])


def test_mistakes_with_the_phantom():
    message = refusal(PHANTOM | {"classes": "a,b"}, 32)
    assert "data.classes (a, b) are not the classes of the phantom (normal, cyst" in message
    options = {"task": "regress", "splits": ("test",)}
    message = refusal(PHANTOM, 32, classes=("age",), **options)
    assert "the classes of the phantom (lesion_area_mm2) are not those of the model" in message
    scored = load_dataset(PHANTOM, 32, classes=("lesion_area_mm2",), **options)
    assert scored.splits["test"].target.shape == (4, 1)
    assert "draws images of each class" in refusal(PHANTOM | {"per_class": 2}, 32, task="segment")
