"""TFDS sets: which features are the target of which task."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from tfds_sets import (
    COUNTS,
    PICTURE,
    SIZE,
    TWO,
    Made,
    kinds,
    labelled,
    load,
    picture,
    plane,
    refusal,
    targeted,
)

from medtl_jax.data.images import decode_image


def expect(dataset, task, classes, target):
    assert (dataset.spec.task, dataset.spec.classes) == (task, classes)
    found = dataset.splits["train"].target
    np.testing.assert_array_equal(found, np.array(target, found.dtype))
    return found.dtype


def test_labels_and_grades(tmp_path):
    labelled().prepare(tmp_path)
    expect(load(tmp_path, task="ordinal"), "ordinal", ("zebra", "ant"), [0, 1] * 6)
    # A trained model's order counts, and the labels are looked up in it.
    model = ("ant", "bee", "zebra")
    expect(load(tmp_path, classes=model), "classify", model, [2, 0] * 6)
    assert "'zebra', which is not one of the model's" in refusal(tmp_path, classes=("ant", "bee"))
    other = refusal(tmp_path, config={"classes": "ant,zebra"})
    assert "data.classes (ant, zebra) are not the classes of tfds/animals (zebra, ant)" in other


@pytest.mark.parametrize("listed", [True, False])
def test_findings(tmp_path, listed):
    flags = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 0]], np.int8)
    if listed:
        feature = kinds.Sequence(kinds.ClassLabel(names=["a", "b", "c"]))
        names, value = ("a", "b", "c"), lambda row: np.flatnonzero(flags[row]).tolist()
    else:
        flags[0] = [-1, 0, 1]
        feature = kinds.Tensor(shape=(3,), dtype=np.int8)
        names, value = ("seen_0", "seen_1", "seen_2"), lambda row: flags[row]
    targeted({"seen": feature}, lambda row: {"seen": value(row)}).prepare(tmp_path)
    dataset = load(tmp_path, "things")
    assert expect(dataset, "multilabel", names, flags) == np.int8
    order = (names[2], names[0], names[1])
    expect(load(tmp_path, "things", classes=order), "multilabel", order, flags[:, [2, 0, 1]])
    model = {"classes": ("x", "y", "z"), "task": "multilabel"}
    named = {"config": {"classes": "x,y,z"}, "task": "multilabel"}
    if listed:
        message = refusal(tmp_path, "things", **model)
        assert "the classes of tfds/things (a, b, c) are not those of the model" in message
        assert "data.classes (x, y, z) are not the classes" in refusal(tmp_path, "things", **named)
    else:
        # The set says no names.
        for options in (model, named):
            expect(load(tmp_path, "things", **options), "multilabel", ("x", "y", "z"), flags)
        assert "are not those of the model" in refusal(tmp_path, "things", classes=("x", "y"))


def test_numbers(tmp_path):
    ages = np.array([30.5, np.nan, 41.1, 50.2, 12.3, 0.1], np.float32)
    targeted(
        {"age": kinds.Scalar(np.float32), "weight": kinds.Scalar(np.float64)},
        lambda row: {"age": ages[row], "weight": 60.0 + row},
    ).prepare(tmp_path)
    dataset = load(tmp_path, "things")
    expected = np.stack([ages, 60 + np.arange(6)], axis=1).astype(np.float32)
    assert expect(dataset, "regress", ("age", "weight"), expected) == np.float32
    vectors = targeted(
        {"size": kinds.Tensor(shape=(2,), dtype=np.float32)},
        lambda row: {"size": expected[row]},
    )
    vectors.name = "vectors"
    vectors.prepare(tmp_path)
    expect(load(tmp_path, "vectors"), "regress", ("size_0", "size_1"), expected)


def test_the_numbers_that_are_taken_are_noted(tmp_path):
    several = {"b": kinds.Scalar(np.float32), "a": kinds.Scalar(np.int32)}
    targeted(several, lambda row: {"b": row, "a": row}).prepare(tmp_path)
    notes = load(tmp_path, "things").spec.notes
    assert "every number of the set is to be predicted: a, b" in notes


def test_labels_that_are_no_list_of_findings(tmp_path):
    for name, length, values, words in (
        ("fixed", 3, [0, 1, 0], "the feature seen is a sequence of exactly 3 labels"),
        ("twice", None, [1, 2, 1], "train/000000 lists the label 'b' more than once"),
        ("unknown", None, [-1], "train/000000 lists the label -1, which is no finding"),
    ):
        feature = kinds.Sequence(kinds.ClassLabel(names=["a", "b", "c"]), length=length)
        made = targeted({"seen": feature}, lambda row, values=values: {"seen": values})
        made.name = name
        made.prepare(tmp_path)
        assert words in refusal(tmp_path, name)


def test_more_classes_than_can_be_are_refused(tmp_path):
    def many_labels(features):
        features["label"]["classLabel"]["numClasses"] = "300000000"

    def many_flags(features):
        features["seen"]["tensor"]["shape"]["dimensions"] = ["300000000"]

    flags = kinds.Tensor(shape=(3,), dtype=np.int8)
    vector = targeted({"seen": flags}, lambda row: {"seen": np.zeros(3, np.int8)})
    for made, change in ((labelled(), many_labels), (vector, many_flags)):
        folder = made.prepare(tmp_path)
        for names in folder.glob("*.labels.txt"):
            names.unlink()
        path = folder / "features.json"
        content = json.loads(path.read_text())
        change(content["featuresDict"]["features"])
        path.write_text(json.dumps(content))
        message = refusal(tmp_path, made.name)
        assert "declares 300000000 classes or numbers, more than the limit of 10,000" in message


def test_masks(tmp_path):
    made = targeted(
        {"mask": kinds.LabeledImage(labels=["off", "rim", "cup"], shape=(None, None, 1))},
        lambda row: {"mask": plane(row, 3), "other": plane(row, 2, 255)},
        other=kinds.Image(shape=(None, None, 1)),
    )
    made.prepare(tmp_path)
    dataset = load(tmp_path, "things")
    assert dataset.spec.classes == ("off", "rim", "cup") and dataset.spec.task == "segment"
    nearest = Image.open(io.BytesIO(plane(2, 3))).resize((SIZE, SIZE), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(dataset.splits["train"].target[2], np.asarray(nearest))
    assert "are not those of the model" in refusal(
        tmp_path, "things", classes=("rim", "off", "cup")
    )
    # Without names of its own, and white where the object is.
    del made.features["mask"]
    made.name, made.example = (
        "plain",
        lambda split, row: {"image": picture(row), "other": plane(row, 2, 255)},
    )
    made.prepare(tmp_path)
    dataset = load(tmp_path, "plain")
    assert dataset.spec.classes == ("background", "foreground")
    assert set(np.unique(dataset.splits["train"].target).tolist()) == {0, 1}
    assert load(tmp_path, "plain", config={"classes": "off,on"}).spec.classes == ("off", "on")


def test_the_set_or_the_user_says_which_target_is_meant(tmp_path):
    several = {
        "features": {"age": kinds.Scalar(np.float32), "mask": kinds.Image(shape=(None, None, 1))},
        "example": lambda split, row: {"age": row, "mask": plane(row)},
    }
    for name, keys, task in (
        ("plain", None, "classify"),
        ("aged", ("image", "age"), "regress"),
        ("masked", ("image", "mask"), "segment"),
    ):
        labelled(name, keys=keys, **several).prepare(tmp_path)
        assert load(tmp_path, name).spec.task == task
        for asked in ("classify", "ordinal", "segment", "regress"):
            assert load(tmp_path, name, task=asked).spec.task == asked
    assert "task=multilabel needs one feature as its target and none fits" in refusal(
        tmp_path, "plain", task="multilabel"
    )


def test_a_set_without_a_clear_target_or_image_is_refused(tmp_path):
    targeted({"left": TWO, "right": TWO}, lambda row: {"left": row % 2, "right": row % 2}).prepare(
        tmp_path
    )
    assert "several fit (left, right)" in refusal(tmp_path, "things")
    Made("bare", {"image": PICTURE}, lambda *_: {"image": picture(0)}, COUNTS).prepare(tmp_path)
    assert "no feature is a label, a mask or a number; it has image" in refusal(tmp_path, "bare")
    two = {"eye": PICTURE, "skin": PICTURE, "label": TWO}
    both = {"eye": picture(0), "skin": picture(1), "label": 0}
    Made("pair", two, lambda *_: both, COUNTS).prepare(tmp_path)
    assert "no feature is called image and 2 are images" in refusal(tmp_path, "pair")
    one = {"eye": PICTURE, "label": TWO}
    Made("single", one, lambda split, row: {"eye": picture(row), "label": row % 2}, COUNTS).prepare(
        tmp_path
    )
    assert len(load(tmp_path, "single").splits["train"]) == 12


def test_images_as_plain_bytes_and_labels_that_nobody_gave(tmp_path):
    Made(
        "bytes",
        {"image": kinds.Text(), "label": TWO},
        lambda split, row: {"image": picture(row), "label": row % 2},
        COUNTS,
    ).prepare(tmp_path)
    image = load(tmp_path, "bytes").splits["train"].images[3]
    np.testing.assert_array_equal(image, decode_image(picture(3), SIZE))
    labelled("secret", example=lambda split, row: {"label": -1} if split == "test" else {}).prepare(
        tmp_path
    )
    assert "test/000000 has no label (-1)" in refusal(tmp_path, "secret")
