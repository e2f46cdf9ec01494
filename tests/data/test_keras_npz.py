"""The Keras layout of .npz files, float images, and a validation split carved from train."""

import io
import struct
import zipfile
from collections import Counter

import numpy as np
import pytest

from medtl_jax.data.readers import load_dataset
from medtl_jax.errors import UserError

SPLITS = ("train", "val", "test")
DIGITS = tuple("0123456789")


def arrays(counts=(40, 4), splits=("train", "test"), shape=(4, 4), classes=2):
    rng = np.random.default_rng(1)
    made = {}
    for split, count in zip(splits, counts, strict=True):
        made[f"x_{split}"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        made[f"y_{split}"] = (np.arange(count) % classes).astype(np.uint8)
    return made


def saved(root, made, name="digits.npz"):
    np.savez(root / name, **{key: value for key, value in made.items() if value is not None})
    return {"name": "npz", "dir": str(root / name)}


def refusal(config, **options):
    with pytest.raises(UserError) as caught:
        load_dataset(config, 4, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- layout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_both_layouts_give_the_same_set(tmp_path, shape):
    made = arrays((6, 4, 5), SPLITS, shape)
    names = {f"{key}_{split}": f"{split}_{word}" for split in SPLITS for key, word in
             (("x", "images"), ("y", "labels"))}  # fmt: skip
    other = {names[key]: value for key, value in made.items()}
    keras = load_dataset(saved(tmp_path, made), 4)
    assert keras.checksum() == load_dataset(saved(tmp_path, other, "medmnist.npz"), 4).checksum()
    assert [len(keras.splits[split]) for split in SPLITS] == [6, 4, 5]
    assert keras.spec.classes == ("0", "1") and keras.spec.name == "digits"
    assert keras.spec.notes == ("images of 5 x 7 resized to 4 x 4",)


def test_colour_images_and_labels_in_a_column(tmp_path):
    # As Keras's CIFAR-10: [n, 32, 32, 3] and [n, 1].
    made = arrays(shape=(4, 4, 3))
    made |= {key: value[:, None] for key, value in made.items() if key.startswith("y")}
    test = load_dataset(saved(tmp_path, made), 4).splits["test"]
    np.testing.assert_array_equal(test.images, made["x_test"])
    assert test.target.tolist() == [0, 1, 0, 1] and test.target.dtype == np.int32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"y_test": None}, ["lacks y_test", "x_train, y_train, x_test, y_test"]),
        ({"x_val": np.zeros((2, 4, 4), np.uint8)}, ["lacks y_val"]),
        ({"train_images": np.zeros((2, 4, 4), np.uint8)}, ["arrays of both layouts", "y_{split}"]),
        (dict.fromkeys(arrays()) | {"a": np.zeros(2)}, ["no array of either layout", "x_{split}"]),
        ({"x_test": np.zeros((4, 5, 5), np.uint8)}, ["all splits need the same image shape"]),
        ({"x_test": np.zeros((4, 4, 4))}, ["x_test must be uint8, as x_train is, not float64"]),
        ({"x_train": np.zeros((40, 4, 4), int)}, ["x_train must be uint8, or floats", "int64"]),
        ({"x_train": np.zeros((40, 4, 4), complex)}, ["x_train must be uint8, or floats"]),
        ({"x_train": np.array([None] * 40)}, ["x_train", "never unpickled"]),
        ({"y_train": np.zeros(40)}, ["y_train must be integers, not float64"]),
        ({"y_train": np.full(40, -3)}, ["y_train has a negative label (-3)"]),
        ({"y_train": np.full(40, 1)}, ["y_train has 1 of the 2 classes", "no image of class 0"]),
    ],
)
def test_mistakes(tmp_path, change, words):
    message = refusal(saved(tmp_path, arrays() | change))
    assert all(word in message for word in words), message


def test_header_that_lies_is_refused_unread(tmp_path):
    stream = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (2**20, 2**10, 2**10)}
    np.lib.format.write_array_header_1_0(stream, header)
    config = saved(tmp_path, arrays() | {"x_train": None})
    with zipfile.ZipFile(config["dir"], "a") as archive:
        archive.writestr("x_train.npy", stream.getvalue())
    assert "x_train declares (1048576, 1024, 1024) float64 but the entry has" in refusal(config)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': (",
        "-" * 9000 + "1",
        "{[]: 1}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (True, 2, 2)}",
    ],
    ids=["open bracket", "too deep", "unhashable keys", "a bool for a size"],
)
def test_malformed_header(tmp_path, header):
    text = header.encode("latin1") + b"\n"
    config = saved(tmp_path, arrays() | {"x_train": None})
    with zipfile.ZipFile(config["dir"], "a") as archive:
        start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text))
        archive.writestr("x_train.npy", start + text + bytes(4))
    message = refusal(config)
    assert "is not a readable .npz file: x_train has a damaged .npy header (" in message


# ---- floats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_floats_give_back_the_bytes_they_were_made_from(tmp_path, dtype, order):
    pixels = np.arange(1200 * 16).reshape(1200, 4, 4) % 256
    floats = np.asarray(pixels / 255.0, dtype, order=order)
    made = {"x_train": floats, "y_train": np.arange(1200) % 2}
    made |= {key.replace("train", "test"): value for key, value in made.items()}
    dataset = load_dataset(saved(tmp_path, made), 4)
    np.testing.assert_array_equal(dataset.splits["test"].images[..., 0], pixels)
    assert "images are floats of 0..1, scaled to 0..255" in dataset.spec.notes


def test_floats_between_bytes_are_rounded(tmp_path):
    made = {key: np.array(value) for key, value in arrays((4, 4)).items()}
    made["x_train"] = np.full((4, 4, 4), 0.3, np.float32)  # 76.5 in float32, 76.500003 exactly
    made["x_test"] = np.full((4, 4, 4), 0.7, np.float32)  # 178.5, 178.499997
    dataset = load_dataset(saved(tmp_path, made) | {"val_fraction": 0.5}, 4)
    assert np.unique(dataset.splits["train"].images).tolist() == [77]
    assert np.unique(dataset.splits["test"].images).tolist() == [178]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (255.0, "floats from 0.0 to 255.0"),
        (-0.25, "floats from -0.25 to 0.0"),
        (np.nextafter(np.float32(1), np.float32(2)), "floats from 0.0 to 1.0000001"),
        (np.nan, "NaN or infinite"),
        (np.inf, "NaN or infinite"),
        (-np.inf, "NaN or infinite"),
    ],
)
def test_other_floats_are_refused(tmp_path, value, words):
    floats = np.zeros((4, 4, 4), np.float32)
    floats[2, 1, 1] = value
    made = arrays((40, 4)) | {"x_train": np.zeros((40, 4, 4), np.float32), "x_test": floats}
    message = refusal(saved(tmp_path, made))
    assert "x_test" in message and words in message


# ---- validation carved from train --------------------------------------------------------------


def test_val_is_carved_and_keeps_ids(tmp_path):
    made = arrays((40, 4))
    config = saved(tmp_path, made) | {"val_fraction": 0.2}
    first, again = load_dataset(config, 4), load_dataset(config, 4)
    assert first.checksum() == again.checksum()
    assert load_dataset(config | {"seed_split": 1}, 4).checksum() != first.checksum()
    assert list(first.splits) == list(SPLITS)
    assert first.spec.notes == ("val: 8 of the 40 train images, stratified by class",)
    assert Counter(first.splits["val"].target.tolist()) == {0: 4, 1: 4}
    rows = {
        split: [int(name.removeprefix("train/")) for name in first.splits[split].ids]
        for split in ("train", "val")
    }
    assert sorted(rows["train"] + rows["val"]) == list(range(40))
    for split, numbers in rows.items():
        images, labels = first.splits[split].images, first.splits[split].target
        np.testing.assert_array_equal(images[..., 0], made["x_train"][numbers])
        assert labels.tolist() == made["y_train"][numbers].tolist()
    assert first.splits["test"].ids.tolist() == [f"test/{n:06d}" for n in range(4)]


def test_medmnist_layout_without_val_is_carved_too(tmp_path):
    made = arrays((40, 4))
    other = {
        f"{key[2:]}_{'images' if key[0] == 'x' else 'labels'}": value for key, value in made.items()
    }
    keras = load_dataset(saved(tmp_path, made), 4)
    assert load_dataset(saved(tmp_path, other), 4).checksum() == keras.checksum()
    other["val_labels"] = made["y_test"]
    assert "lacks val_images" in refusal(saved(tmp_path, other))


def test_train_too_small_to_carve(tmp_path):
    message = refusal(saved(tmp_path, arrays((2, 2))))
    assert "cannot make a val split from train" in message and "add images" in message
    assert "val_fraction must lie" in refusal(saved(tmp_path, arrays()) | {"val_fraction": 1})


def test_scoring_reads_the_splits_of_the_training_run(tmp_path):
    config = saved(tmp_path, arrays((40, 4)))
    whole = load_dataset(config, 4)
    for names in (("val",), ("val", "test"), ("train", "val")):
        part = load_dataset(config, 4, classes=("0", "1"), splits=names)
        assert tuple(part.splits) == names
        for name in names:
            assert part.splits[name].ids.tolist() == whole.splits[name].ids.tolist()
    alone = load_dataset(config, 4, classes=("0", "1"), splits=("train",))
    assert len(alone.splits["train"]) == 40 and "train is whole" in alone.spec.notes[0]
    test_only = {key: value for key, value in arrays((40, 4)).items() if key.endswith("test")}
    config = saved(tmp_path, test_only)
    options = {"classes": ("0", "1"), "splits": ("test",)}
    assert len(load_dataset(config, 4, **options).splits["test"]) == 4
    assert "lacks x_train, y_train" in refusal(config)


# ---- the real files ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "train", "test"),
    [
        ("mnist", 28, (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949), 10_000),
        ("usps", 16, (1194, 1005, 731, 658, 652, 556, 664, 645, 542, 644), 2007),
    ],
)
def test_digits(shared, name, size, train, test):
    path = shared / "data" / "digits" / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"../shared/data/digits/{name}.npz is not here")
    dataset = load_dataset({"name": "npz", "dir": str(path)}, size)
    parts = dataset.splits
    assert dataset.spec.classes == DIGITS and parts["train"].images.shape[1:] == (size, size, 1)
    labels = np.concatenate([parts["train"].target, parts["val"].target])
    assert tuple(np.bincount(labels)) == train and len(parts["test"]) == test
    # scikit-learn rounds the carved part up.
    assert len(parts["val"]) == -(-sum(train) * 15 // 100)
    with np.load(path, allow_pickle=False) as file:
        raw = file["x_test"].astype(np.float64)
    expected = np.floor(raw * (1 if name == "mnist" else 255) + 0.5)
    np.testing.assert_array_equal(parts["test"].images[..., 0], expected)
