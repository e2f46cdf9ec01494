"""Names and options of data sets, and sets that are only scored: one clear line a mistake."""

import numpy as np
import pytest
from image_sets import (
    ROWS,
    SPLITS,
    arrays,
    folder_set,
    npz_set,
    refusal,
)

from medtl_jax.data.phantom import make_phantom
from medtl_jax.data.readers import load_dataset

# ---- names and options --------------------------------------------------------------------------


def test_unknown_names_list_the_known_ones():
    for name in ("", "imagenet", "tfds", "medmnist"):
        message = refusal({"name": name})
        known = ("phantom", "npz", "medmnist/<flag>", "folder", "csv", "tfds/<builder>")
        assert all(name in message for name in known)
    message = refusal({"name": "phantom"}, task="detect")
    assert "unknown task 'detect'" in message and "multilabel" in message


def test_options_out_of_range(tmp_path):
    root = folder_set(tmp_path, (4, 2), splits=("train", "test"))
    config = {"name": "folder", "dir": str(root)}
    for key, value in [
        ("bit_depth", 7),
        ("bit_depth", 12.0),
        ("cache_gb", -1),
        ("cache_gb", "a"),
        ("test_fraction", 1),
        ("folds", -1),
        ("fold", 1),
        ("val_fraction", 0),
        ("val_fraction", "a"),
        ("seed_split", -1),
    ]:
        assert f"data.{key} must" in refusal(config | {key: value})
    assert "model.image_size must" in refusal(config, image_size=0)
    for name in ("npz", "folder", "csv"):
        assert "data.dir is empty" in refusal({"name": name, "dir": ""})


def test_phantom_gets_its_options():
    sizes = {"train": 6, "val": 5, "test": 4, "domain": "b"}
    dataset = load_dataset({"name": "phantom", "phantom": sizes, "seed_split": 5}, 32)
    made = make_phantom(32, **sizes, seed=5)
    assert dataset.checksum() == made.checksum() and dataset.spec == made.spec
    assert "data.phantom.trian" in refusal({"name": "phantom", "phantom": {"trian": 3}})


# ---- scoring a checkpoint: some splits, the model's classes -------------------------------------


KNOWN = ("normal", "cyst", "polyp")  # not in the readers' order


def test_some_splits_are_those_of_the_whole_set(tmp_path):
    root = folder_set(tmp_path, (20, 2), splits=("train", "test"))
    phantom = {"train": 4, "val": 6, "test": 8, "domain": "mixed"}
    for config in (
        {"name": "folder", "dir": str(root), "val_fraction": 0.2},
        npz_set(tmp_path, arrays((32, 32))),
        {"name": "phantom", "phantom": phantom},
    ):
        whole = load_dataset(config, 32)
        assert list(whole.splits) == list(SPLITS)
        for names in (("val", "test"), ("test",), ("val",)):
            part = load_dataset(config, 32, classes=whole.spec.classes, splits=names)
            assert tuple(part.splits) == names
            for name in names:
                for field in ("images", "target", "ids"):
                    wanted = getattr(whole.splits[name], field)
                    np.testing.assert_array_equal(getattr(part.splits[name], field), wanted)


def test_splits_come_in_their_usual_order(tmp_path):
    config = npz_set(tmp_path, arrays())
    assert list(load_dataset(config, 4, splits=["test", "train"]).splits) == ["train", "test"]
    assert "no split 'tset'" in refusal(config, splits=("train", "tset"))
    assert "no split" in refusal(config, splits=())
    with pytest.raises(ValueError, match="train is needed"):
        load_dataset(config, 4, splits=("test",))


def test_folder_with_a_test_split_alone(tmp_path):
    root = folder_set(tmp_path, (2,), splits=("test",))
    config, options = {"name": "folder", "dir": str(root)}, {"splits": ("test",)}
    (root / "test" / "polyp").mkdir()
    dataset = load_dataset(config, 4, classes=KNOWN, **options)
    # Pictures 1 and 2 are cysts, 3 and 4 normal; "normal" is the model's class 0.
    test = dataset.splits["test"]
    assert test.images[:, 0, 0, 0].tolist() == [1, 3, 2, 4]
    assert test.target.tolist() == [1, 0, 1, 0] and test.target.dtype == np.int32
    assert dataset.spec.classes == KNOWN
    assert dataset.spec.notes == ("test has no image of polyp",)
    message = refusal(config, classes=("normal", "polyp"), **options)
    assert "test/cyst/0.png" in message and "'cyst'" in message and "normal, polyp" in message
    (root / "test" / "other").mkdir()
    assert "other is empty" in refusal(config, classes=KNOWN, **options)
    assert "no folder" in refusal(config, classes=KNOWN, splits=("test", "val"))
    for folder in ("cyst", "normal", "other"):
        (root / "test" / folder).rename(root / f".{folder}")
    assert "the split test has no images" in refusal(config, classes=KNOWN, **options)


def test_a_val_of_empty_classes_is_not_carved_from_nothing(tmp_path):
    for label in KNOWN:
        (tmp_path / "val" / label).mkdir(parents=True)
    config = {"name": "folder", "dir": str(tmp_path)}
    assert "the split val has no images" in refusal(config, classes=KNOWN, splits=("val",))


def test_only_the_wanted_splits_are_decoded(tmp_path):
    root = folder_set(tmp_path)
    (root / "train" / "cyst" / "0.png").write_text("x")
    for config in ({"name": "folder", "dir": str(root)}, listed(root, ROWS)):
        assert "cyst/0.png" in refusal(config, classes=KNOWN)
        dataset = load_dataset(config, 4, classes=KNOWN, splits=("val", "test"))
        assert [len(split) for split in dataset.splits.values()] == [4, 4]


def test_train_without_its_val_is_noted(tmp_path):
    root = folder_set(tmp_path, (20, 2), splits=("train", "test"))
    config = {"name": "folder", "dir": str(root)}
    dataset = load_dataset(config, 4, splits=("train",))
    assert len(dataset.splits["train"]) == 40
    assert dataset.spec.notes[0].startswith("train is whole: the set has no val split")
    folder_set(tmp_path)
    assert load_dataset(config, 4, splits=("train",)).spec.notes == ()


def listed(root, rows, header=("path", "split", "label")):
    lines = [",".join(row) for row in (header, *rows)]
    (root / "list.csv").write_text("\n".join(lines))
    return {"name": "csv", "dir": str(root / "list.csv")}


def test_csv_with_test_rows_alone(tmp_path):
    folder_set(tmp_path)
    rows = [row for row in ROWS if row[1] == "test" and row[2] == "normal"]
    options = {"classes": KNOWN, "splits": ("test",)}
    dataset = load_dataset(listed(tmp_path, rows), 4, **options)
    assert dataset.splits["test"].target.tolist() == [0, 0]
    assert dataset.spec.notes[-1] == "test has no image of cyst, polyp"
    assert "no rows of split 'train'" in refusal(listed(tmp_path, rows), classes=KNOWN)
    odd = [*rows, ("val/cyst/0.png", "test", "cist")]
    assert "val/cyst/0.png has the label 'cist'" in refusal(listed(tmp_path, odd), **options)


def test_csv_leak_between_other_splits_is_refused(tmp_path):
    folder_set(tmp_path)
    header = ("path", "split", "label", "patient")
    patient_of = {"train": "p1", "val": "p1", "test": "p2"}
    rows = [(*row, patient_of[row[1]]) for row in ROWS]
    config = listed(tmp_path, rows, header) | {"csv_patient_column": "patient"}
    message = refusal(config, classes=KNOWN, splits=("test",))
    assert "1 patients are in more than one split (first: p1)" in message


def test_npz_with_a_test_split_alone(tmp_path):
    made = {key: value for key, value in arrays().items() if key.startswith("test")}
    options = {"classes": ("b", "a", "c"), "splits": ("test",)}
    dataset = load_dataset(npz_set(tmp_path, made), 4, **options)
    assert dataset.spec.classes == ("b", "a", "c")
    assert dataset.splits["test"].target.tolist() == [0, 1] * 3
    assert "test has no image of c" in dataset.spec.notes
    config = npz_set(tmp_path, made, "BreastMNIST.npz")
    notes = load_dataset(config, 4, **options).spec.notes
    assert "the model's; by the file's name they are malignant, normal, benign" in notes[-1]
    assert "lacks train_images" in refusal(config, classes=("b", "a"))
    made["test_labels"] = np.array([0, 3] * 3)
    message = refusal(npz_set(tmp_path, made), **options)
    assert "label 3 is out of range for the 3 classes that the model knows (b, a, c)" in message


def test_the_models_classes_must_be_those_of_a_named_set(tmp_path):
    for name, own in (("phantom", "normal, cyst"), ("medmnist/breastmnist", "malignant")):
        for classes in (("dog", "cat"), ("infiltrate", "nodule", "cyst", "normal")):
            message = refusal({"name": name}, 32, classes=classes, splits=("test",))
            assert own in message and ", ".join(classes) in message
    for classes in ((), ("a",), ("a", "a")):
        assert "two or more names" in refusal({"name": "phantom"}, 32, classes=classes)
