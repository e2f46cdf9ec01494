"""The readers: what each layout gives, and one clear line for each mistake."""

import hashlib
import io
import pathlib
import types
import zipfile
from collections import Counter

import numpy as np
import pooch
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from medtl_jax.data import medmnist, npz, readers
from medtl_jax.data.carve import carve
from medtl_jax.data.phantom import make_phantom
from medtl_jax.data.readers import load_dataset
from medtl_jax.errors import UserError

SHARED = pathlib.Path(__file__).resolve().parents[2] / ".." / "shared"
SPLITS = ("train", "val", "test")


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8), value, np.uint8)).save(path)


def folder_set(root, counts=(4, 2, 2), classes=("cyst", "normal"), splits=SPLITS):
    value = 0
    for split, count in zip(splits, counts, strict=True):
        for label in classes:
            for number in range(count):
                value += 1
                picture(root / split / label / f"{number}.png", value)
    return root


def refusal(config, image_size=4, **options):
    with pytest.raises(UserError) as caught:
        load_dataset(config, image_size, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- names and options -------------------------------------------------------------------------


def test_unknown_names_list_the_known_ones():
    for name in ("", "imagenet", "tfds/mnist", "medmnist"):
        message = refusal({"name": name})
        assert all(known in message for known in ("phantom", "npz", "medmnist/<flag>", "csv"))
    assert "tfds is not supported yet" in refusal({"name": "tfds/mnist"})


def test_options_out_of_range(tmp_path):
    root = folder_set(tmp_path, (4, 2), splits=("train", "test"))
    config = {"name": "folder", "dir": str(root)}
    for key, value in [
        ("bit_depth", 7),
        ("bit_depth", 12.0),
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


# ---- folder ------------------------------------------------------------------------------------


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
    assert train.labels.tolist() == [0] * 4 + [1] * 4 and train.labels.dtype == np.int32
    assert train.images[:, 0, 0, 0].tolist() == list(range(1, 9))
    assert train.ids.tolist()[0] == "train/cyst/0.png" and train.patients is None
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
    (root / "train" / "cyst" / "a.dcm").write_text("x")


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
        (foreign_file, ["a.dcm is not an image file"]),
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
    assert Counter(first.splits["val"].labels.tolist()) == {0: 4, 1: 4}
    assert Counter(first.splits["train"].labels.tolist()) == {0: 16, 1: 16}
    assert first.spec.notes == ("val: 8 of the 40 train images, stratified by class",)
    ids = [set(first.splits[split].ids.tolist()) for split in ("train", "val")]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 40
    other = load_dataset(config | {"seed_split": 1}, 4)
    assert other.checksum() != first.checksum()


def test_folder_too_small_to_carve(tmp_path):
    root = folder_set(tmp_path, (1, 1), splits=("train", "test"))
    assert "cannot make a val split" in refusal({"name": "folder", "dir": str(root)})


# ---- carving -----------------------------------------------------------------------------------


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


# ---- csv ---------------------------------------------------------------------------------------

ROWS = [
    (f"{split}/{label}/{number}.png", split, label)
    for split, count in zip(SPLITS, (4, 2, 2), strict=True)
    for label in ("cyst", "normal")
    for number in range(count)
]


def csv_set(root, rows=ROWS, header=("path", "split", "label"), delimiter=",", encoding="utf-8"):
    folder_set(root)
    lines = [delimiter.join(map(str, row)) for row in (header, *rows)]
    (root / "list.csv").write_bytes(("\r\n".join(lines) + "\r\n\r\n").encode(encoding))
    return {"name": "csv", "dir": str(root / "list.csv")}


def with_patients(patient_of):
    return [(*row, patient_of(index, row)) for index, row in enumerate(ROWS)]


def test_csv_equals_folder(tmp_path):
    listed = load_dataset(csv_set(tmp_path), 4)
    folder = load_dataset({"name": "folder", "dir": str(tmp_path)}, 4)
    assert listed.checksum() == folder.checksum()
    assert listed.spec.classes == folder.spec.classes
    assert "leakage of patients not checked" in listed.spec.notes[0]


@pytest.mark.parametrize(
    ("delimiter", "encoding"), [(";", "utf-8"), ("\t", "utf-8"), (",", "utf-8-sig")]
)
def test_csv_dialects(tmp_path, delimiter, encoding):
    plain = load_dataset(csv_set(tmp_path), 4)
    other = load_dataset(csv_set(tmp_path, delimiter=delimiter, encoding=encoding), 4)
    assert other.checksum() == plain.checksum()


def test_csv_quotes_and_own_column_names(tmp_path):
    rows = [("x, y; z", f'"{path}"', label, split) for path, split, label in ROWS]
    rows = [(f'"{note}"', *rest) for note, *rest in rows]
    config = csv_set(tmp_path, rows, ("note", "file", "diagnosis", "fold"))
    columns = {
        "csv_path_column": "file",
        "csv_split_column": "fold",
        "csv_label_column": "diagnosis",
    }
    assert (
        load_dataset(config | columns, 4).checksum()
        == load_dataset(csv_set(tmp_path), 4).checksum()
    )


def test_csv_patients_are_kept(tmp_path):
    rows = with_patients(lambda index, row: f"p{index // 2}")
    config = csv_set(tmp_path, rows, ("path", "split", "label", "who"))
    dataset = load_dataset(config | {"csv_patient_column": "who"}, 4)
    assert dataset.splits["val"].patients.tolist() == ["p4", "p4", "p5", "p5"]
    assert dataset.spec.notes == ()


def test_csv_leak_is_refused(tmp_path):
    rows = with_patients(lambda index, row: f"p{index % 4}")
    config = csv_set(tmp_path, rows, ("path", "split", "label", "patient"))
    message = refusal(config | {"csv_patient_column": "patient"})
    assert "4 patients are in more than one split (first: p0, p1, p2)" in message


def test_csv_val_is_carved_by_patient(tmp_path):
    rows = []
    for number in range(60):
        split, label = ("test" if number >= 48 else "train"), ("a", "b")[number // 3 % 2]
        picture(tmp_path / f"{number}.png", number)
        rows.append((f"{number}.png", split, label, f"p{number // 3}"))
    config = csv_set(tmp_path, rows, ("path", "split", "label", "patient"))
    dataset = load_dataset(config | {"csv_patient_column": "patient", "val_fraction": 0.25}, 4)
    train, val = dataset.splits["train"], dataset.splits["val"]
    assert not set(train.patients.tolist()) & set(val.patients.tolist())
    assert len(val) == 12 and Counter(val.labels.tolist()) == {0: 6, 1: 6}
    assert dataset.spec.notes[-1].endswith("stratified by class, whole patients")


def test_csv_class_absent_from_test_is_noted(tmp_path):
    rows = [row for row in ROWS if row[1:] != ("test", "cyst")]
    assert "test has no image of cyst" in load_dataset(csv_set(tmp_path, rows), 4).spec.notes


def changed(index, column, value):
    rows = [list(row) for row in ROWS]
    rows[index][column] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (changed(2, 0, ""), ["line 4", "column 'path' is empty"]),
        (changed(2, 2, " "), ["line 4", "column 'label' is empty"]),
        (changed(0, 1, "Train"), ["line 2", "split 'Train' is not train, val or test"]),
        (changed(0, 0, ROWS[1][0]), [f"'{ROWS[1][0]}' is listed 2 times"]),
        (changed(0, 0, "./" + ROWS[1][0]), [f"'{ROWS[1][0]}' is listed 2 times"]),
        (changed(0, 0, "../x.png"), ["'../x.png' leaves the csv's folder"]),
        (changed(0, 0, "a\\..\\..\\x.png"), ["leaves the csv's folder"]),
        (changed(0, 0, "/x.png"), ["'/x.png' is absolute"]),
        (changed(0, 0, "C:\\x.png"), ["is absolute"]),
        (changed(0, 0, "gone.png"), ["1 of 16 images cannot be read", "gone.png (no such file)"]),
        (changed(-1, 2, "polyp"), ["class 'polyp' has no image in the split train"]),
        ([*ROWS, ("a.png", "train")], ["line 18: 2 cells, the header has 3"]),
        ([*ROWS, ('"a.png', "train", "x")], ["unexpected end of data"]),
        ([row for row in ROWS if row[1] != "test"], ["no rows of split 'test'"]),
        ([row for row in ROWS if row[2] == "cyst"], ["only one class ('cyst')"]),
        ([], ["has a header but no rows"]),
    ],
)
def test_csv_mistakes(tmp_path, rows, words):
    message = refusal(csv_set(tmp_path, rows))
    assert all(word in message for word in words), message


def test_csv_header_and_file_mistakes(tmp_path):
    config = csv_set(tmp_path, header=("file", "split", "label"))
    assert "column 'path' is missing; columns: file, split, label" in refusal(config)
    config = csv_set(tmp_path, header=("path", "split", "split"))
    assert "column 'split' occurs twice" in refusal(config)
    assert "column 'patient' is missing" in refusal(
        csv_set(tmp_path) | {"csv_patient_column": "patient"}
    )
    assert "not UTF-8" in refusal(csv_set(tmp_path, [("é", "x", "y")], encoding="latin-1"))
    assert "cannot read" in refusal({"name": "csv", "dir": str(tmp_path)})
    assert "No such file" in refusal({"name": "csv", "dir": str(tmp_path / "gone.csv")})
    (tmp_path / "list.csv").write_text("\n")
    assert "list.csv is empty" in refusal({"name": "csv", "dir": str(tmp_path / "list.csv")})


# ---- npz ---------------------------------------------------------------------------------------


def arrays(shape=(5, 7), classes=2, count=6):
    rng = np.random.default_rng(1)
    made = {}
    for split in SPLITS:
        made[f"{split}_images"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        made[f"{split}_labels"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
    return made


def npz_set(root, made, name="x.npz"):
    np.savez_compressed(root / name, **made)
    return {"name": "npz", "dir": str(root / name)}


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_npz_values(tmp_path, shape):
    made = arrays(shape, classes=3)
    dataset = load_dataset(npz_set(tmp_path, made), 4)
    assert dataset.spec.classes == ("0", "1", "2") and dataset.spec.name == "x"
    for split in SPLITS:
        part = dataset.splits[split]
        assert part.labels.tolist() == [0, 1, 2, 0, 1, 2] and part.labels.dtype == np.int32
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
        ({"val_labels": np.zeros((6, 14), np.uint8)}, ["14 columns", "multi-label"]),
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
        assert {s: dataset.splits[s].labels.tolist() for s in SPLITS} == labels
    else:
        refusal(config, 2)


# ---- MedMNIST ----------------------------------------------------------------------------------


def test_table_is_complete():
    assert len(medmnist.TABLE) == 12
    sums = [md5 for known in medmnist.TABLE.values() for md5 in known.md5]
    assert len(set(sums)) == 48 and all(len(bytes.fromhex(md5)) == 16 for md5 in sums)
    # Numbers of classes as in Table 1 of Yang et al. 2023 (Scientific Data 10:41).
    assert {flag: len(known.classes) for flag, known in medmnist.TABLE.items()} == {
        "pathmnist": 9, "chestmnist": 14, "dermamnist": 7, "octmnist": 4, "pneumoniamnist": 2,
        "retinamnist": 5, "breastmnist": 2, "bloodmnist": 8, "tissuemnist": 8, "organamnist": 11,
        "organcmnist": 11, "organsmnist": 11,
    }  # fmt: skip


def test_official_breastmnist():
    folder = SHARED / "data" / "medmnist"
    if not (folder / "breastmnist.npz").is_file():
        pytest.skip("../shared/data/medmnist/breastmnist.npz is not here")
    dataset = load_dataset({"name": "medmnist/breastmnist", "dir": str(folder)}, 28)
    assert [len(dataset.splits[split]) for split in SPLITS] == [546, 78, 156]
    assert np.bincount(dataset.splits["test"].labels).tolist() == [42, 114]
    assert dataset.spec.licence == "CC BY 4.0" and dataset.spec.notes == ()
    assert dataset.spec.source.startswith("https://zenodo.org/records/10519652/files/breastmnist")


def test_local_copy_with_another_md5_is_refused(tmp_path):
    npz_set(tmp_path, arrays(), "breastmnist.npz")
    message = refusal({"name": "medmnist/breastmnist", "dir": str(tmp_path)})
    assert "750601b1f35ba3300ea97c75c52ff8f6" in message and "data.name=npz" in message


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("chestmnist_64", "multi-label, which is not supported yet"),
        ("organmnist3d", "3D sets are not supported"),
        ("breastmnist_32", "choose from pathmnist"),
        ("breastmnist_", "choose from pathmnist"),
        ("../breastmnist", "choose from pathmnist"),
    ],
)
def test_sets_that_are_not_read(flag, words):
    assert words in refusal({"name": f"medmnist/{flag}"})


def test_dir_of_medmnist_must_be_a_folder(tmp_path):
    config = npz_set(tmp_path, arrays())
    assert "must be a folder" in refusal(config | {"name": "medmnist/breastmnist"})


@pytest.mark.parametrize(
    "error", [requests.ConnectionError("no route\nto host"), ValueError("MD5 of\nfile differs")]
)
def test_failed_download_is_one_line(tmp_path, monkeypatch, error):
    def fail(*args, **keys):
        raise error

    monkeypatch.setattr(pooch, "retrieve", fail)
    message = refusal({"name": "medmnist/breastmnist_128", "dir": str(tmp_path)})
    assert "zenodo.org/records/10519652/files/breastmnist_128.npz" in message
    assert f"save it as {tmp_path / 'breastmnist_128.npz'}" in message


def test_download_goes_to_the_cache_and_reports_progress(tmp_path, monkeypatch):
    made = arrays((4, 4), classes=5)
    stream = io.BytesIO()
    np.savez(stream, **made)
    body = stream.getvalue()
    known = medmnist.TABLE["retinamnist"]
    md5 = (hashlib.md5(body).hexdigest(), *known.md5[1:])
    replaced = medmnist.MedMnistSet(known.classes, known.task, known.licence, md5)
    monkeypatch.setitem(medmnist.TABLE, "retinamnist", replaced)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / name)
    asked = []

    def get(url, **keys):
        asked.append(url)
        return types.SimpleNamespace(
            raise_for_status=lambda: None,
            headers={"content-length": str(len(body))},
            iter_content=lambda chunk_size: [body],
        )

    monkeypatch.setattr(requests, "get", get)
    calls = []
    for _ in range(2):
        dataset = load_dataset({"name": "medmnist/retinamnist"}, 4, lambda *c: calls.append(c))
    assert asked == ["https://zenodo.org/records/10519652/files/retinamnist.npz?download=1"]
    assert (tmp_path / "medtl_jax" / "retinamnist.npz").read_bytes() == body
    assert calls[-1] == (len(body), len(body), "downloading retinamnist.npz")
    assert dataset.spec.notes == ("ordinal grades are read as classes without an order",)
    assert dataset.spec.name == "medmnist/retinamnist"


# ---- scoring a checkpoint: some splits, the model's classes -----------------------------------

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
                for field in ("images", "labels", "ids"):
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
    assert test.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4]
    assert test.labels.tolist() == [1, 1, 0, 0] and test.labels.dtype == np.int32
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
    assert dataset.splits["test"].labels.tolist() == [0, 0]
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
    assert dataset.splits["test"].labels.tolist() == [0, 1] * 3
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


# ---- real images -------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_chest_radiographs_by_patient():
    path = SHARED / "data" / "chest_xray_kermany224" / "labels.csv"
    if not path.is_file():
        pytest.skip("../shared/data/chest_xray_kermany224 is not here")
    config = {"name": "csv", "dir": str(path), "csv_patient_column": "group"}
    dataset = readers.load_dataset(config, 64)
    counts = {split: np.bincount(dataset.splits[split].labels).tolist() for split in SPLITS}
    assert counts == {"train": [1105, 2966], "val": [158, 423], "test": [316, 856]}
    assert dataset.splits["train"].images.shape == (4071, 64, 64, 1)
    folder = readers.load_dataset({"name": "folder", "dir": str(path.parent)}, 64)
    ours = dict(zip(dataset.splits["test"].ids, dataset.splits["test"].images, strict=True))
    theirs = dict(zip(folder.splits["test"].ids, folder.splits["test"].images, strict=True))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
