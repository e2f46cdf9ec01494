""".npz files of classes in MedMNIST's layout, and one clear line for each mistake."""

import io
import pathlib
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_sets import (
    SPLITS,
    arrays,
    npz_set,
    refusal,
)
from PIL import Image

from medtl_jax.data import npz
from medtl_jax.data.readers import load_dataset


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_npz_values(tmp_path, shape):
    made = arrays(shape, classes=3)
    dataset = load_dataset(npz_set(tmp_path, made), 4)
    assert dataset.spec.classes == ("0", "1", "2") and dataset.spec.name == "x"
    for split in SPLITS:
        part = dataset.splits[split]
        assert part.target.tolist() == [0, 1, 2, 0, 1, 2] and part.target.dtype == np.int32
        picture = Image.fromarray(made[f"{split}_images"][3]).resize((4, 4), Image.BICUBIC)
        np.testing.assert_array_equal(part.images[3], np.asarray(picture).reshape(4, 4, -1))
        assert part.ids[3] == f"{split}/000003"
    assert dataset.spec.notes == ("images of 5 x 7 resized to 4 x 4",)


def test_npz_of_the_right_size_is_unchanged(tmp_path):
    made = arrays((4, 4)) | {"val_labels": np.array([0, 1] * 3, np.int64)}
    dataset = load_dataset(npz_set(tmp_path, made), 4)
    np.testing.assert_array_equal(dataset.splits["val"].images[..., 0], made["val_images"])
    assert dataset.spec.notes == ()


def test_npz_takes_class_names_from_the_file_name(tmp_path):
    dataset = load_dataset(npz_set(tmp_path, arrays(), "BreastMNIST_mine.npz"), 4)
    assert dataset.spec.classes == ("malignant", "normal, benign")
    assert any("by the file's name" in note for note in dataset.spec.notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"val_images": None, "test_labels": None}, ["lacks val_images, test_labels"]),
        ({"val_images": np.zeros((6, 5, 7), np.float32)}, ["val_images must be uint8", "float32"]),
        ({"val_images": np.zeros((6, 5), np.uint8)}, ["val_images has shape (6, 5)"]),
        ({"val_images": np.zeros((6, 5, 7, 2), np.uint8)}, ["has shape (6, 5, 7, 2)"]),
        ({"val_images": np.zeros((6, 5, 8), np.uint8)}, ["all splits need the same image shape"]),
        ({"val_images": np.zeros((5, 5, 7), np.uint8)}, ["val has 5 images but 6 labels"]),
        (
            {"val_images": np.zeros((0, 5, 7), np.uint8), "val_labels": np.zeros(0, np.uint8)},
            ["val_images is empty"],
        ),
        ({"val_labels": np.zeros((6, 14), np.uint8)}, ["val_labels", "(6, 14)", "multilabel"]),
        ({"val_labels": np.zeros(6, np.float64)}, ["val_labels must be integers, not float64"]),
        ({"val_labels": np.array(["a"] * 6)}, ["val_labels must be integers"]),
        ({"val_labels": np.full(6, -1)}, ["negative label (-1)"]),
        ({"val_labels": np.full(6, 2**40)}, ["no image of class 2"]),
        ({"train_labels": np.array([0, 2] * 3)}, ["no image of class 1"]),
        ({"train_labels": np.ones(6, int)}, ["no image of class 0"]),
        ({f"{split}_labels": np.zeros(6, int) for split in SPLITS}, ["all labels are 0"]),
        ({"train_images": np.array([None] * 6)}, ["train_images", "never unpickled"]),
    ],
)
def test_npz_mistakes(tmp_path, change, words):
    made = {key: value for key, value in (arrays() | change).items() if value is not None}
    message = refusal(npz_set(tmp_path, made))
    assert all(word in message for word in words), message


def test_npz_label_beyond_the_known_classes(tmp_path):
    config = npz_set(tmp_path, arrays(classes=3), "breastmnist_x.npz")
    assert "label 2 is out of range for the 2 classes" in refusal(config)


def test_npz_file_mistakes(tmp_path):
    config = npz_set(tmp_path, arrays())
    path = pathlib.Path(config["dir"])
    assert "no such file" in refusal({"name": "npz", "dir": str(tmp_path / "gone.npz")})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert "not a readable .npz file" in refusal(config)
    middle = bytearray(data)
    middle[200] ^= 255
    path.write_bytes(bytes(middle))
    assert "not a readable .npz file" in refusal(config)


def npy_header(shape, dtype="|u1"):
    stream = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def test_npz_that_declares_too_much_is_refused_unread(tmp_path, monkeypatch):
    config = npz_set(tmp_path, arrays())
    with zipfile.ZipFile(config["dir"]) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries["train_images.npy"] = npy_header((2**20, 2**10, 2**10))
    with zipfile.ZipFile(config["dir"], "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    assert "declares (1048576, 1024, 1024) uint8 but the entry has" in refusal(config)
    config = npz_set(tmp_path, arrays())
    monkeypatch.setattr(npz, "MAX_NPZ_BYTES", 500)
    assert "more than the limit" in refusal(config)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(
        st.sampled_from(SPLITS), st.lists(st.integers(-1, 4), min_size=1, max_size=8), min_size=3
    )
)
def test_npz_labels_are_accepted_exactly_when_train_has_every_class(tmp_path, labels):
    made = {}
    for split, values in labels.items():
        made[f"{split}_images"] = np.zeros((len(values), 2, 2), np.uint8)
        made[f"{split}_labels"] = np.array(values)
    config = npz_set(tmp_path, made)
    every = {value for values in labels.values() for value in values}
    count = max(every) + 1
    if min(every) >= 0 and count >= 2 and set(labels["train"]) == set(range(count)):
        dataset = load_dataset(config, 2)
        assert len(dataset.spec.classes) == count
        assert {s: dataset.splits[s].target.tolist() for s in SPLITS} == labels
    else:
        refusal(config, 2)
