"""csv lists of classes: dialects, columns, patients, and one clear line for each mistake."""

import pathlib
from collections import Counter

import numpy as np
import pytest
from image_sets import (
    ROWS,
    SPLITS,
    csv_set,
    picture,
    refusal,
)

from medtl_jax.data import readers
from medtl_jax.data.readers import load_dataset

SHARED = pathlib.Path(__file__).resolve().parents[2] / ".." / "shared"


def with_patients(patient_of):
    return [(*row, patient_of(index, row)) for index, row in enumerate(ROWS)]


def test_csv_equals_folder(tmp_path):
    by_name = sorted(ROWS, key=lambda row: (SPLITS.index(row[1]), row[0].split("/")[-1]))
    listed = load_dataset(csv_set(tmp_path, by_name), 4)
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
    assert len(val) == 12 and Counter(val.target.tolist()) == {0: 6, 1: 6}
    assert dataset.spec.notes[-1].endswith("stratified by class, whole patients")


def test_csv_class_absent_from_test_is_noted(tmp_path):
    rows = [row for row in ROWS if row[1:] != ("test", "cyst")]
    assert "test has no image of cyst" in load_dataset(csv_set(tmp_path, rows), 4).spec.notes


def with_scanner():
    return [(*row, "ab"[index // 2 % 2], str(index % 2)) for index, row in enumerate(ROWS)]


def test_csv_rows_are_chosen(tmp_path):
    header = ("path", "split", "label", "scanner", "view")
    config = csv_set(tmp_path, with_scanner(), header)
    chosen = load_dataset(config | {"csv_where": " scanner = b "}, 4)
    wanted = {row[0] for row in with_scanner() if row[3] == "b"}
    ids = [name for split in chosen.splits.values() for name in split.ids.tolist()]
    assert set(ids) == wanted and 0 < len(ids) == len(wanted) < len(ROWS)
    assert "only rows with scanner=b" in chosen.spec.notes
    fewer = [row for row in with_scanner() if row[3] == "b"]
    assert chosen.checksum() == load_dataset(csv_set(tmp_path, fewer, header), 4).checksum()


def test_csv_rows_that_are_not_chosen_are_not_looked_at(tmp_path):
    rows = [*with_scanner(), ("../x.png", "train", "cyst", "c", "0")]
    config = csv_set(tmp_path, rows, ("path", "split", "label", "scanner", "view"))
    assert "leaves" in refusal(config | {"csv_where": "scanner=c"})
    load_dataset(config | {"csv_where": "scanner=a"}, 4)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("scanner", ["data.csv_where='scanner' must be column=value"]),
        ("scanner=", ["must be column=value"]),
        ("scanner=a,", ["must be column=value"]),
        ("=a", ["must be column=value"]),
        ("device=a", ["column 'device' is missing"]),
        ("scanner=c", ["no row has 'scanner' = 'c' (data.csv_where)", "there are 'a', 'b'"]),
        ("scanner=a,view=2", ["no row has 'view' = '2'"]),
    ],
)
def test_csv_where_mistakes(tmp_path, where, words):
    config = csv_set(tmp_path, with_scanner(), ("path", "split", "label", "scanner", "view"))
    message = refusal(config | {"csv_where": where})
    assert all(word in message for word in words), message


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
        (changed(0, 0, '"a\nb.png"'), ["rename 'a\\nb.png' ('path')", "control character"]),
        (changed(0, 1, '"tr\nain"'), ["rename 'tr\\nain' ('split')"]),
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
    message = refusal(csv_set(tmp_path, header=("path", "split", '"la\nbel"')))
    assert "rename the column 'la\\nbel'" in message
    assert "not UTF-8" in refusal(csv_set(tmp_path, [("é", "x", "y")], encoding="latin-1"))
    assert "cannot read" in refusal({"name": "csv", "dir": str(tmp_path)})
    assert "No such file" in refusal({"name": "csv", "dir": str(tmp_path / "gone.csv")})
    (tmp_path / "list.csv").write_text("\n")
    assert "list.csv is empty" in refusal({"name": "csv", "dir": str(tmp_path / "list.csv")})


# ---- real images --------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_chest_radiographs_by_patient():
    path = SHARED / "data" / "chest_xray_kermany224" / "labels.csv"
    if not path.is_file():
        pytest.skip("../shared/data/chest_xray_kermany224 is not here")
    config = {"name": "csv", "dir": str(path), "csv_patient_column": "group"}
    dataset = readers.load_dataset(config, 64)
    counts = {split: np.bincount(dataset.splits[split].target).tolist() for split in SPLITS}
    assert counts == {"train": [1105, 2966], "val": [158, 423], "test": [316, 856]}
    assert dataset.splits["train"].images.shape == (4071, 64, 64, 1)
    folder = readers.load_dataset({"name": "folder", "dir": str(path.parent)}, 64)
    ours = dict(zip(dataset.splits["test"].ids, dataset.splits["test"].images, strict=True))
    theirs = dict(zip(folder.splits["test"].ids, folder.splits["test"].images, strict=True))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
