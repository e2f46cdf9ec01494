"""TFDS sets: pixels as from files, names and versions, and one clear line for each mistake."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tfds_sets import (
    SIZE,
    kinds,
    labelled,
    load,
    picture,
    plane,
    refusal,
)

from medtl_jax.data.images import decode_image
from medtl_jax.data.streams import Streamed, stream_batches
from medtl_jax.errors import UserError

# ---- images, splits, ids ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pixels_are_those_of_the_stored_files(tmp_path, kind):
    made = labelled(example=lambda split, row: {"image": picture(row, kind)})
    made.prepare(tmp_path)
    dataset = load(tmp_path)
    assert dataset.spec.task == "classify" and dataset.spec.classes == ("zebra", "ant")
    assert dataset.spec.name == "tfds/animals" and dataset.spec.licence == "unknown"
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 12,
        "val": 4,
        "test": 6,
    }
    for name, split in dataset.splits.items():
        for row in range(len(split)):
            np.testing.assert_array_equal(split.images[row], decode_image(picture(row, kind), SIZE))
        np.testing.assert_array_equal(split.target, np.arange(len(split)) % 2)
        assert split.target.dtype == np.int32 and split.patients is None
        assert split.ids[1] == f"{name}/000001"
    assert "no feature patient: leakage of patients not checked" in dataset.spec.notes


def test_a_shuffled_set_keeps_images_and_labels_together(tmp_path):
    labelled(
        shuffled=True,
        features={"id": kinds.Text(), "age": kinds.Scalar(np.int64)},
        example=lambda split, row: {"id": f"{split} {row}", "age": row},
        counts={"train": 40, "test": 6},
    ).prepare(tmp_path)
    dataset = load(tmp_path, splits=("train", "test"))
    rows = [int(name.split()[1]) for name in dataset.splits["train"].ids]
    assert sorted(rows) == list(range(40)) and rows != sorted(rows)
    np.testing.assert_array_equal(dataset.splits["train"].target, np.array(rows) % 2)
    for row, image in zip(rows, dataset.splits["train"].images, strict=True):
        np.testing.assert_array_equal(image, decode_image(picture(500 + row), SIZE))


def test_streamed_sets_equal_those_in_memory(tmp_path):
    labelled(
        features={"mask": kinds.LabeledImage(labels=["off", "on"], shape=(None, None, 1))},
        example=lambda split, row: {"mask": plane(row)},
    ).prepare(tmp_path)
    for task in ("classify", "segment"):
        whole = load(tmp_path, task=task).splits
        streamed = load(tmp_path, task=task, config={"cache_gb": 0}).splits
        assert isinstance(streamed["train"].images, Streamed)
        assert isinstance(streamed["train"].target, Streamed) == (task == "segment")
        for name, split in streamed.items():
            np.testing.assert_array_equal(split.images[:], whole[name].images)
            np.testing.assert_array_equal(split.target[:], whole[name].target)
        indices = np.random.default_rng(0).integers(0, 12, (20, 5))
        batches = stream_batches({"image": streamed["train"].images}, indices, threads=4)
        for batch, rows in zip(batches, indices, strict=True):
            np.testing.assert_array_equal(batch["image"], whole["train"].images[rows])


def test_a_missing_val_is_carved_from_train_by_whole_patients(tmp_path):
    labelled(
        features={"patient": kinds.Text()},
        example=lambda split, row: {"patient": f"{split} {row // 2}"},
        counts={"train": 20, "test": 6},
    ).prepare(tmp_path)
    dataset = load(tmp_path, config={"val_fraction": 0.3})
    train, val = dataset.splits["train"], dataset.splits["val"]
    assert len(val) == 6 and len(train) == 14
    assert not set(train.patients) & set(val.patients)
    rows = [int(name.removeprefix("train/")) for name in val.ids]
    expected = load(tmp_path, splits=("train",)).splits["train"]
    np.testing.assert_array_equal(val.images, expected.images[rows])
    assert any(note.startswith("val: 6 of the 20 train images") for note in dataset.spec.notes)


def test_patients_in_two_splits_and_ids_that_occur_twice_are_refused(tmp_path):
    labelled(
        "leaky",
        features={"patient": kinds.Scalar(np.int32)},
        example=lambda split, row: {"patient": row},
    ).prepare(tmp_path)
    assert "6 patients are in more than one split (first: 0, 1, 2)" in refusal(tmp_path, "leaky")
    labelled(
        "twice", features={"id": kinds.Text()}, example=lambda split, row: {"id": "a"}
    ).prepare(tmp_path)
    assert "'train/a' is listed 12 times" in refusal(tmp_path, "twice")


@pytest.mark.parametrize("value", [np.nan, 2.5])
def test_a_patient_that_is_not_known_is_none(tmp_path, value):
    # Every image of train but one has a patient of its own.
    labelled(
        features={"patient": kinds.Scalar(np.float32)},
        example=lambda split, row: {"patient": value if row == 3 else 10 * len(split) + row},
        counts={"train": 12, "test": 3},
    ).prepare(tmp_path)
    if value == 2.5:
        assert load(tmp_path, splits=("train",)).splits["train"].patients[3] == "2.5"
    else:
        assert "train/000003 has the patient 'nan', which is no name" in refusal(tmp_path)


def test_ids_that_start_anew_in_each_split_get_its_name(tmp_path):
    labelled(
        features={"id": kinds.Scalar(np.int64)}, example=lambda split, row: {"id": row}
    ).prepare(tmp_path)
    for splits in (("train", "val", "test"), ("test",)):
        dataset = load(tmp_path, splits=splits, classes=("zebra", "ant"))
        for name, split in dataset.splits.items():
            assert split.ids.tolist() == [f"{name}/{row}" for row in range(len(split))]


# ---- names, versions, damage --------------------------------------------------------------------


def test_the_newest_version_and_the_only_configuration_are_taken(tmp_path):
    for version, count in (("1.9.0", 4), ("1.10.0", 6)):
        counts = {"train": count, "test": 2}
        labelled(counts=counts, version=version).prepare(tmp_path)
    sizes = {
        name: len(load(tmp_path, name, splits=("train",)).splits["train"])
        for name in ("animals", "animals:1.9.0")
    }
    assert sizes == {"animals": 6, "animals:1.9.0": 4}
    assert "no TFDS set 'animals:2.0.0' is prepared" in refusal(tmp_path, "animals:2.0.0")
    labelled("zoo", config="small").prepare(tmp_path)
    assert len(load(tmp_path, "zoo").splits["train"]) == 12
    labelled("zoo", config="large", counts={"train": 4, "test": 2}).prepare(tmp_path)
    assert "one of tfds/zoo/large, tfds/zoo/small" in refusal(tmp_path, "zoo")
    assert len(load(tmp_path, "zoo/large", splits=("train",)).splits["train"]) == 4


def test_names_that_do_not_exist(tmp_path):
    labelled(counts={"train": 4}).prepare(tmp_path)
    assert "no TFDS set 'animal' is prepared in" in refusal(tmp_path, "animal")
    assert "did you mean animals" in refusal(tmp_path, "animal")
    assert "run tfds build mnist --data_dir=" in refusal(tmp_path, "mnist")
    assert "it has animals, and TFDS knows no set of this name" in refusal(tmp_path, "qqqqqq")
    for name in ("", "../animals", "animals/..", "/etc", "a b", "animals:1", "animals/x/y"):
        assert "names no TFDS set" in refusal(tmp_path, name)
    assert "no such folder" in refusal(tmp_path / "gone")
    assert "data.dir is empty" in refusal(tmp_path, config={"dir": ""})
    assert "no rows of split 'test': add some, or export the set as csv" in refusal(tmp_path)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def declare(content, key, value):
    content["splits"][0][key] = value


def cut(path):
    path.write_bytes(path.read_bytes()[:5000])


SHARD = "animals-train.array_record-00000-of-00001"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda at: cut(at / SHARD), "is not a readable TFDS set: ArrayRecord file should be"),
        (lambda at: (at / SHARD).unlink(), f"lacks {SHARD}: prepare the set again"),
        (lambda at: (at / "features.json").unlink(), "has no features.json"),
        (lambda at: (at / "features.json").write_text("{"), "features.json cannot be read"),
        (lambda at: (at / "features.json").write_text("[" * 99999), "features.json cannot be read"),
        (lambda at: (at / "features.json").write_text("{}"), "is not a readable TFDS set"),
        (lambda at: (at / "dataset_info.json").write_text("[]"), "is not a readable TFDS set"),
        (
            lambda at: edit(at / "dataset_info.json", lambda c: c.update(fileFormat="tfrecord")),
            "is prepared as tfrecord, which needs TensorFlow",
        ),
        (
            lambda at: edit(
                at / "dataset_info.json", lambda c: declare(c, "shardLengths", ["99999999999"])
            ),
            "declares 99999999999 records of 'train' in",
        ),
        (
            lambda at: edit(
                at / "dataset_info.json", lambda c: declare(c, "filepathTemplate", "../{SPLIT}")
            ),
            "names files outside of it",
        ),
        (
            lambda at: edit(at / "dataset_info.json", lambda c: declare(c, "shardLengths", ["50"])),
            "is not a readable TFDS set",
        ),
    ],
)
def test_damaged_sets_are_one_line(tmp_path, damage, words):
    damage(labelled().prepare(tmp_path))
    assert words in refusal(tmp_path)


EVIL = "evil_module.Feature"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("features.json", {"pythonClassName": EVIL, "text": {}}),
        ("features.json", {"python_class_name": EVIL, "text": {}}),
        ("features.json", {"type": EVIL, "content": {}}),
        ("features.json", {"featuresDict": {"features": {"a": {"pythonClassName": EVIL}}}}),
        (
            "features.json",
            {
                "type": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
                "proto_cls": "tensorflow_datasets.FeaturesDict",
                "content": json.dumps({"features": {"a": {"pythonClassName": EVIL}}}),
            },
        ),
        (
            "features.json",
            {
                "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
                "jsonFeature": {"json": json.dumps({"feature": {"type": EVIL, "content": {}}})},
            },
        ),
        ("dataset_info.json", {"features": {"python_class_name": EVIL, "text": {}}}),
    ],
)
def test_no_code_is_loaded_that_a_description_names(tmp_path, monkeypatch, name, content):
    code = tmp_path / "code"
    code.mkdir()
    (code / "evil_module.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(code)
    folder = labelled().prepare(tmp_path)
    if name == "features.json":
        (folder / name).write_text(json.dumps(content))
    else:
        edit(folder / name, lambda found: found.update(content))
    assert f"names the class '{EVIL}', which is not one of TFDS's own" in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()
    # TFDS itself would have run it.
    if content.get("pythonClassName") == EVIL:
        with pytest.raises(ValueError, match="Unrecognized FeatureConnector"):
            tfds.builder_from_directory(folder)
        assert (tmp_path / "ran").exists()


def test_a_damaged_image_is_named_by_its_record(tmp_path):
    labelled(
        example=lambda split, row: {"image": b"no picture"} if (split, row) == ("test", 2) else {}
    ).prepare(tmp_path)
    for cache in (4.0, 0):
        message = refusal(tmp_path, config={"cache_gb": cache})
        assert "1 of 22 images cannot be read, first: test/000002 (image) (not a PNG" in message
    folder = labelled("other").prepare(tmp_path)
    dataset = load(tmp_path, "other", config={"cache_gb": 0})
    (folder / "other-test.array_record-00000-of-00001").write_bytes(b"")
    with pytest.raises(UserError, match=r"test/000001 \(image\) cannot be read"):
        dataset.splits["test"].images[1]
