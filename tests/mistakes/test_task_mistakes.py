"""The user's mistakes about tasks, tables and masks: one line, exit code 2, nothing written."""

import pathlib

import numpy as np
import pytest
from mistake_commands import class_folders, folder_keys, set_keys
from PIL import Image

# ---- tasks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "settings", "words"),
    [
        ("classify", {"train__select": "dice"}, "train.select='dice' is no value of the task"),
        ("classify", {"train__select": "mae"}, "choose from loss, accuracy, "),
        ("multilabel", {"train__select": "accuracy"}, "choose from loss, auc, pr_auc, f1"),
        ("ordinal", {"train__select": "dice"}, "quadratic_kappa"),
        ("segment", {"train__select": "accuracy"}, "choose from loss, dice, iou"),
        ("regress", {"train__select": "auc"}, "choose from loss, mae, mse, rmse, r2, pearson"),
        (
            "regress",
            {"train__label_smoothing": 0.1},
            "train.label_smoothing=0.1 means nothing for the task regress",
        ),
        ("regress", {"train__class_weights": "balanced"}, "means nothing for the task regress"),
        ("multilabel", {"train__sampling": "balanced"}, "train.sampling=balanced means nothing"),
        ("ordinal", {"train__focal_gamma": 2.0}, "train.focal_gamma=2.0 means nothing"),
        ("segment", {"train__logit_adjustment": 1.0}, "train.logit_adjustment=1.0 means nothing"),
        ("classify", {"train__ordinal": "cumulative"}, "train.ordinal=cumulative means nothing"),
        ("classify", {"train__dice": 0.5}, "train.dice=0.5 means nothing"),
        ("segment", {"train__huber_delta": 2.0}, "train.huber_delta=2.0 means nothing"),
        (
            "segment",
            {"model__name": "googlenet", "model__auxiliary": 0.3, "model__weights": "none"},
            "auxiliary",
        ),
        ("segment", {"model__decoder": "64,,8"}, "model.decoder=64,,8: write numbers of channels"),
        ("segment", {"model__decoder": "64,0"}, "model.decoder=64,0: write numbers of channels"),
        ("segment", {"model__decoder": ""}, "write numbers of channels"),
        ("segment", {"model__decoder": "8,8"}, "write 5 numbers of channels"),
        ("classify", {"data__classes": "a,b,c"}, "are not the classes of the phantom"),
    ],
)
def test_settings_that_the_task_has_not(refusal, task, settings, words):
    message = refusal(*set_keys(task=task, **settings))
    assert words in message, message


# ---- tables ------------------------------------------------------------------------------------


def image_table(root: pathlib.Path, columns: dict[str, str]) -> list[str]:
    """Six grey images of 40 x 30, two a split, with six cells of each column; keys to read them.

    `columns` has the cells of a column as one text, separated by spaces, `-` for an empty one.
    """
    (root / "images").mkdir(parents=True)
    cells = [text.replace("-", "").split(" ") for text in columns.values()]
    lines = [",".join(("path", "split", *columns))]
    for number, row in enumerate(zip(*cells, strict=True) if cells else [()] * 6):
        grey = np.random.default_rng(number).integers(0, 256, (30, 40), np.uint8)
        Image.fromarray(grey).save(root / "images" / f"{number}.png")
        split = ("train", "val", "test")[number // 2]
        lines.append(",".join((f"images/{number}.png", split, *row)))
    (root / "list.csv").write_text("\n".join(lines))
    return set_keys(data__name="csv", data__dir=root / "list.csv")


GRADES = {"grade": "I II I II I II"}
FINDINGS = {"edema": "0 1 - 1 0 1", "mass": "1 0 1 0 1 0"}


@pytest.mark.parametrize(
    ("columns", "settings", "words"),
    [
        ({}, {}, "column 'label' is missing; columns: path, split"),
        (GRADES, {"task": "regress"}, "column 'label' is missing; columns: path, split, grade"),
        (FINDINGS, {"data__csv_label_column": "edema,cyst"}, "column 'cyst' is missing"),
        (FINDINGS, {"data__csv_mask_column": "mask"}, "column 'mask' is missing"),
        (FINDINGS, {"data__csv_label_column": "edema,edema"}, "names 'edema' twice"),
        (
            FINDINGS,
            {"data__csv_label_column": "edema,mass", "task": "classify"},
            "task=classify takes one data.csv_label_column, not 2 (edema, mass)",
        ),
        (FINDINGS, {"task": "segment"}, "task=segment needs data.csv_mask_column"),
        (
            {"a": "- - - - - -", "b": "- - NaN - - NA"},
            {"data__csv_label_column": "a,b"},
            "a, b are missing for every image: fill them in",
        ),
        (
            {"age": "- - - - - -"},
            {"data__csv_label_column": "age", "task": "regress"},
            "age are missing for every image: fill them in",
        ),
        (
            {**FINDINGS, "mass": "- - 1 0 1 0"},
            {"data__csv_label_column": "edema,mass"},
            "'mass' is missing for every image of the split train",
        ),
        (
            {"edema": "0 1 2 1 0 1", "mass": "1 0 1 0 1 0"},
            {"data__csv_label_column": "edema,mass"},
            "images/2.png has '2' for 'edema': findings are 0, 1 or",
        ),
        (
            {"age": "41 old 3 5 7 8"},
            {"data__csv_label_column": "age", "task": "regress"},
            "images/1.png has 'old' for 'age', which is not a number",
        ),
        (
            {"age": "41 41 3 5 7 8"},
            {"data__csv_label_column": "age", "task": "regress", "data__batch_size": 4},
            "'age' is 41 in every training image",
        ),
        (
            {"label": "cyst mass cyst mass polyp mass"},
            {"data__classes": "mass,cyst"},
            "images/4.png has the label 'polyp', which is not one of data.classes (mass, cyst)",
        ),
        (
            GRADES,
            {"data__csv_label_column": "grade", "task": "ordinal"},
            "name them from the lowest to the highest in data.classes",
        ),
        (
            {"label": "a b a b a b"},
            {"data__folds": 3},
            "data.folds=3 divides a table without splits",
        ),
        (
            {"label": "a b a b a b"},
            {"data__folds": 3, "data__fold": 3, "data__csv_split_column": ""},
            "data.fold must be an integer from 0 to 2, not 3",
        ),
        (
            {"label": "a b a b a b"},
            {"data__folds": 1, "data__csv_split_column": ""},
            "data.folds=1 leaves nothing to train on",
        ),
        (
            {"label": "a b a b a b"},
            {"data__folds": 7, "data__csv_split_column": ""},
            "6 images are too few for 7 folds",
        ),
        ({"label": "a b a b a b"}, {"data__fold": 2}, "data.fold"),
    ],
)
def test_tables(refusal, tmp_path, columns, settings, words):
    message = refusal(*image_table(tmp_path / "set", columns), *set_keys(**settings))
    assert words in message, message


def masked(root: pathlib.Path, spoilt: np.ndarray, split: str) -> list[str]:
    """`image_table` with masks beside its images, of which the first of a split is `spoilt`."""
    keys = image_table(root, {"mask": "0 1 2 3 4 5"})
    (root / "masks").mkdir()
    mask = np.zeros((30, 40), np.uint8)
    mask[:9] = 255
    for number in range(6):
        bad = number == 2 * ("train", "val", "test").index(split)
        Image.fromarray(spoilt if bad else mask).save(root / "masks" / f"{number}.png")
    columns = {"data__csv_mask_column": "mask", "data__csv_mask_format": "masks/{}.png"}
    return [*keys, *set_keys(**columns)]


@pytest.mark.parametrize("cache", [4.0, 0.0])
@pytest.mark.parametrize(
    ("spoilt", "split", "words"),
    [
        (np.zeros((40, 30), np.uint8), "val", ["30 x 40 pixels and its image 40 x 30"]),
        (np.zeros((60, 80), np.uint8), "test", ["80 x 60 pixels and its image 40 x 30"]),
        (np.full((30, 40), 7, np.uint8), "train", ["7"]),
    ],
)
def test_masks_that_do_not_fit(refusal, tmp_path, cache, spoilt, split, words):
    root = tmp_path / "set"
    keys = masked(root, spoilt, split)
    message = refusal(*keys, *set_keys(data__cache_gb=cache))
    number = 2 * ("train", "val", "test").index(split)
    assert "1 of 6 masks cannot be used" in message, message
    assert all(word in message for word in [f"masks/{number}.png", *words]), message


def test_masks_that_no_decoder_was_made_for(refusal, tmp_path):
    arrays = {}
    for split in ("train", "val", "test"):
        images = np.random.default_rng(0).integers(0, 256, (8, 32, 32), np.uint8)
        arrays |= {f"{split}_images": images, f"{split}_labels": (images > 99).astype(np.uint8)}
    np.savez(tmp_path / "masks.npz", **arrays)
    keys = set_keys(data__name="npz", data__dir="masks.npz")
    assert "masks has a mask for each image: set --config.task=segment" in refusal(*keys)


def test_folders_hold_classes_only(refusal, tmp_path):
    root = class_folders(tmp_path / "set")
    message = refusal(*folder_keys(root), *set_keys(task="segment"))
    assert "task=segment: data.name=folder says the class of each image only" in message


def test_tfds_sets_that_are_not_there(refusal, tmp_path):
    (tmp_path / "sets" / "breast" / "1.0.0").mkdir(parents=True)
    (tmp_path / "sets" / "breast" / "1.0.0" / "dataset_info.json").write_text("{}")
    for name, folder, words in [
        ("brest", "sets", ["no TFDS set 'brest' is prepared in sets", "did you mean breast"]),
        ("qqq", "sets", ["it has breast, and TFDS knows no set of this name"]),
        ("mnist", "sets", ["run tfds build mnist --data_dir=sets"]),
        ("breast", "sets", ["breast/1.0.0 has no features.json: prepare the set"]),
        ("breast:2.0.0", "sets", ["2.0.0"]),
        ("../breast", "sets", ["data.name=tfds/../breast names no TFDS set"]),
        ("breast", "gone", ["no such folder: gone"]),
        ("breast", "", ["data.dir is empty: set it to TFDS's data_dir"]),
    ]:
        message = refusal(*set_keys(data__name=f"tfds/{name}", data__dir=folder))
        assert all(word in message for word in words), message
