"""Class folders: what they give, and one clear line for each mistake."""

from collections import Counter

import numpy as np
import pytest
from image_sets import (
    SPLITS,
    folder_set,
    picture,
    refusal,
)

from medtl_jax.data.readers import load_dataset


def test_folder_gives_labels_ids_and_pixels(tmp_path):
    root = folder_set(tmp_path)
    for name in ("labels.csv", "README.md", ".DS_Store", "LICENSE"):
        (root / name).write_text("x")
    (root / "train" / "counts.txt").write_text("x")
    (root / "train" / "cyst" / "Thumbs.db").write_text("x")
    dataset = load_dataset({"name": "folder", "dir": str(root)}, 4)
    assert dataset.spec.classes == ("cyst", "normal") and dataset.spec.task == "classify"
    assert [len(dataset.splits[split]) for split in SPLITS] == [8, 4, 4]
    train = dataset.splits["train"]
    assert train.images.shape == (8, 4, 4, 1) and train.images.dtype == np.uint8
    # By the files' names, then by class: 1 to 4 are cysts, 5 to 8 normal.
    assert train.target.tolist() == [0, 1] * 4 and train.target.dtype == np.int32
    assert train.images[:, 0, 0, 0].tolist() == [1, 5, 2, 6, 3, 7, 4, 8]
    assert train.ids.tolist()[:2] == ["train/cyst/0.png", "train/normal/0.png"]
    assert train.patients is None
    ids = np.concatenate([dataset.splits[split].ids for split in SPLITS])
    assert len(set(ids.tolist())) == 16


def test_numeric_classes_sort_by_value(tmp_path):
    root = folder_set(tmp_path, classes=("10", "2", "1"))
    assert load_dataset({"name": "folder", "dir": str(root)}, 4).spec.classes == ("1", "2", "10")


def extra_split(root):
    picture(root / "valid" / "cyst" / "0.png", 1)


def stray_image(root):
    picture(root / "0.png", 1)


def stray_in_split(root):
    picture(root / "train" / "0.png", 1)


def foreign_file(root):
    (root / "train" / "cyst" / "a.gz").write_text("x")


def nested_folder(root):
    picture(root / "train" / "cyst" / "sub" / "0.png", 1)


def class_in_one_split(root):
    picture(root / "test" / "polyp" / "0.png", 1)


def empty_class(root):
    for split in SPLITS:
        (root / split / "polyp").mkdir()


def no_test(root):
    (root / "test").rename(root / ".test")


def no_classes(root):
    (root / "val" / "cyst").rename(root / ".a")
    (root / "val" / "normal").rename(root / ".b")


def one_class(root):
    for split in SPLITS:
        (root / split / "cyst").rename(root / split / ".cyst")


def broken_image(root):
    (root / "test" / "cyst" / "1.png").write_text("x")


def newline_in_name(root):
    picture(root / "train" / "cyst" / "a\nb.png", 1)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (extra_split, ["unexpected folder", "valid"]),
        (stray_image, ["0.png lies outside the class folders"]),
        (stray_in_split, ["0.png lies outside the class folders"]),
        (foreign_file, ["a.gz is not an image file"]),
        (nested_folder, ["sub is not an image file"]),
        (class_in_one_split, ["test", "differ", "polyp"]),
        (empty_class, ["polyp is empty"]),
        (no_test, ["no folder", "test"]),
        (no_classes, ["val has no class folders"]),
        (one_class, ["only one class ('normal')"]),
        (broken_image, ["1 of 16 images cannot be read", "1.png"]),
        (newline_in_name, ["'train/cyst/a\\nb.png'", "control"]),
    ],
)
def test_folder_mistakes(tmp_path, spoil, words):
    root = folder_set(tmp_path)
    spoil(root)
    message = refusal({"name": "folder", "dir": str(root)})
    assert all(word in message for word in words), message


def test_missing_folder(tmp_path):
    assert "no such folder" in refusal({"name": "folder", "dir": str(tmp_path / "gone")})


def test_folder_without_val_is_carved(tmp_path):
    root = folder_set(tmp_path, (20, 2), splits=("train", "test"))
    config = {"name": "folder", "dir": str(root), "val_fraction": 0.2}
    first, again = load_dataset(config, 4), load_dataset(config, 4)
    assert first.checksum() == again.checksum()
    assert Counter(first.splits["val"].target.tolist()) == {0: 4, 1: 4}
    assert Counter(first.splits["train"].target.tolist()) == {0: 16, 1: 16}
    assert first.spec.notes == ("val: 8 of the 40 train images, stratified by class",)
    ids = [set(first.splits[split].ids.tolist()) for split in ("train", "val")]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 40
    other = load_dataset(config | {"seed_split": 1}, 4)
    assert other.checksum() != first.checksum()


def test_folder_too_small_to_carve(tmp_path):
    root = folder_set(tmp_path, (1, 1), splits=("train", "test"))
    assert "cannot make a val split" in refusal({"name": "folder", "dir": str(root)})
