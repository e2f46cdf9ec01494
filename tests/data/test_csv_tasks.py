"""csv lists of findings, grades and numbers; one clear line for each mistake."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_sets import SPLITS, refusal, table
from PIL import Image

from medtl_jax.data.catalog import MISSING
from medtl_jax.data.readers import load_dataset
from medtl_jax.data.targets import read_numbers
from medtl_jax.errors import UserError


def targets(dataset):
    return np.concatenate([dataset.splits[split].target for split in SPLITS])


# ---- several findings ---------------------------------------------------------------------------


FINDINGS = {"edema": ["0", "1", "", "NaN", "1.0", "0"], "mass": ["1", "NA", "0.0", "0", "n/a", "1"]}


@pytest.mark.parametrize("task", ["", "multilabel"])
def test_several_columns_of_zero_and_one_are_findings(tmp_path, task):
    dataset = load_dataset(table(tmp_path, FINDINGS), 4, task=task)
    assert dataset.spec.task == "multilabel" and dataset.spec.classes == ("edema", "mass")
    target = targets(dataset)
    assert target.dtype == np.int8 and MISSING == -1
    assert target.T.tolist() == [[0, 1, -1, -1, 1, 0], [1, -1, 0, 0, -1, 1]]
    assert dataset.spec.notes[1:] == ("val has no image of mass", "val has no known label of edema")


def test_one_column_of_findings_has_to_be_asked_for(tmp_path):
    config = table(tmp_path, {"edema": ["0", "1", "", "1.0", "NaN", "0"]})
    assert targets(load_dataset(config, 4, task="multilabel")).shape == (6, 1)
    assert "column 'edema' is empty" in refusal(config)


@pytest.mark.parametrize("cell", ["-1", "-1.0", "2", "yes", "0.5"])
def test_other_findings_are_refused(tmp_path, cell):
    config = table(tmp_path, FINDINGS | {"mass": ["0", "1", cell, "0", "0", "0"]})
    message = refusal(config)
    assert f"2.png has '{cell}' for 'mass'" in message and "0, 1 or" in message


def test_a_finding_that_is_missing(tmp_path):
    every = {"edema": [""] * 6, "mass": ["na"] * 6}
    assert "edema, mass are missing for every image: fill" in refusal(table(tmp_path, every))
    for rows, split in (((3,), "val"), ((4, 5), "test")):
        cells = {name: ["" if row in rows else "01"[row % 2] for row in range(6)] for name in every}
        config = table(tmp_path, cells)
        message = f"edema, mass are missing for every image of the split {split}: fill them in"
        assert message in refusal(config)
        assert message in refusal(config, classes=("edema", "mass"), splits=(split,))
        others = tuple(name for name in SPLITS if name != split)
        assert tuple(load_dataset(config, 4, splits=others).splits) == others
    in_train = FINDINGS | {"mass": ["", "", "", "1", "0", "1"]}
    config = table(tmp_path, in_train)
    assert "'mass' is missing for every image of the split train" in refusal(config)
    scored = load_dataset(config, 4, classes=("edema", "mass"), splits=("train", "test"))
    assert scored.splits["train"].target[:, 1].tolist() == [-1, -1, -1]


def test_findings_come_in_the_models_order(tmp_path):
    config = table(tmp_path, FINDINGS)
    trained = load_dataset(config, 4)
    options = {"task": "multilabel", "splits": ("test",)}
    scored = load_dataset(config, 4, classes=("mass", "edema"), **options)
    np.testing.assert_array_equal(
        scored.splits["test"].target, trained.splits["test"].target[:, ::-1]
    )
    message = refusal(config, classes=("mass",), **options)
    assert "edema, mass" in message and "not those of the model (mass)" in message


# ---- classes and grades -------------------------------------------------------------------------


def test_named_classes_give_the_order(tmp_path):
    config = table(tmp_path, {"label": ["b", "a", "b", "a", "b", "a"]}) | {"classes": "b, a"}
    dataset = load_dataset(config, 4)
    assert dataset.spec.classes == ("b", "a") and targets(dataset).tolist() == [0, 1] * 3
    message = refusal(config | {"classes": "b,c"})
    assert "1.png has the label 'a', which is not one of data.classes (b, c)" in message
    assert "class 'c' has no image in the split train" in refusal(config | {"classes": "a,b,c"})
    for classes in ("a,,b", "a,b,a", "a"):
        assert "data.classes=" in refusal(config | {"classes": classes})
    message = refusal(config, classes=("a", "b"))
    assert "the classes of data.classes (b, a) are not those of the model (a, b)" in message


def test_grades_are_numbers_or_named(tmp_path):
    config = table(tmp_path, {"grade": ["10", "2", "-1", "2", "10", "2"]})
    dataset = load_dataset(config, 4, task="ordinal")
    assert dataset.spec.task == "ordinal" and dataset.spec.classes == ("-1", "2", "10")
    assert targets(dataset).tolist() == [2, 1, 0, 1, 2, 1] and targets(dataset).dtype == np.int32
    config = table(tmp_path, {"grade": ["mild", "none", "severe", "mild", "none", "mild"]})
    assert "data.classes" in refusal(config, task="ordinal")
    named = config | {"classes": "none,mild,severe"}
    dataset = load_dataset(named, 4, task="ordinal")
    assert dataset.spec.classes == ("none", "mild", "severe")
    assert targets(dataset).tolist() == [1, 0, 2, 1, 0, 1]


def test_folders_take_classes_and_grades_only(tmp_path):
    for split in SPLITS:
        for label in ("2", "10"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("L", (4, 4)).save(tmp_path / split / label / "0.png")
    config = {"name": "folder", "dir": str(tmp_path)}
    dataset = load_dataset(config, 4, task="ordinal")
    assert dataset.spec.task == "ordinal" and dataset.spec.classes == ("2", "10")
    assert load_dataset(config | {"classes": "10,2"}, 4).spec.classes == ("10", "2")
    for task in ("multilabel", "segment", "regress"):
        assert f"task={task}: data.name=folder" in refusal(config, task=task)


# ---- numbers ------------------------------------------------------------------------------------


def test_numbers(tmp_path):
    columns = {"age": ["1", "-2.5", "", "4e1", ".5", "7."], "mass": [1, 2, 3, "nan", 5, "NA"]}
    dataset = load_dataset(table(tmp_path, columns), 4, task="regress")
    assert dataset.spec.task == "regress" and dataset.spec.classes == ("age", "mass")
    expected = np.array([[1, -2.5, np.nan, 40, 0.5, 7], [1, 2, 3, np.nan, 5, np.nan]], np.float32)
    assert targets(dataset).dtype == np.float32
    np.testing.assert_array_equal(targets(dataset), expected.T)
    assert dataset.spec.notes[1:] == ("val has no known value of mass",)
    scored = load_dataset(
        table(tmp_path, columns), 4, task="regress", classes=("mass", "age"), splits=("test",)
    )
    np.testing.assert_array_equal(scored.splits["test"].target, expected[::-1, 4:].T)


@pytest.mark.parametrize("cell", ["inf", "-Infinity", "1e39", "1_000", "12 mm", "0x10", "\u0663"])
def test_what_is_no_number(tmp_path, cell):
    config = table(tmp_path, {"age": [1, 2, cell, 4, 5, 6]})
    assert f"2.png has '{cell}' for 'age', which is not a number" in refusal(config, task="regress")


def test_a_number_that_is_missing(tmp_path):
    config = table(tmp_path, {"age": [""] * 6})
    assert "age are missing for every image" in refusal(config, task="regress")
    config = table(tmp_path, {"age": ["", "", "", 1, 2, 3]})
    assert "'age' is missing for every image of the split train" in refusal(config, task="regress")
    config = table(tmp_path, {"age": [1, 2, 3, "", 2, 3]})
    message = "age are missing for every image of the split val"
    assert message in refusal(config, task="regress")
    train_and_test = load_dataset(config, 4, task="regress", splits=("train", "test"))
    assert len(train_and_test.splits["test"]) == 2


def test_val_may_not_take_all_that_is_known_of_a_number(tmp_path):
    for number in range(40):
        Image.new("L", (4, 4), number).save(tmp_path / f"{number}.png")
    # z is known of one image in train: with val_fraction = 0.15 it goes to val for some seeds.
    lines = ["path,split,y,z"]
    for n in range(40):
        lines.append(f"{n}.png,{'train' if n < 36 else 'test'},{n},{n if n in (5, 38) else ''}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    config = {"name": "csv", "dir": str(tmp_path / "list.csv"), "csv_label_column": "y,z"}
    taken = 0
    for seed in range(30):
        try:
            dataset = load_dataset(config | {"seed_split": seed}, 4, task="regress")
        except UserError as error:
            assert "data.val_fraction took all known values of 'z' from train" in str(error)
            taken += 1
        else:
            assert np.isfinite(dataset.splits["train"].target[:, 1]).sum() == 1
            assert "val has no known value of z" in dataset.spec.notes
    assert 0 < taken < 30


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_numbers_are_read_exactly(values):
    ids = [str(number) for number in range(len(values))]
    read = read_numbers([[repr(value)] for value in values], ids, ["x"], "set")
    np.testing.assert_array_equal(read[:, 0], np.array(values, np.float32))


# ---- cells that say nothing, or too much --------------------------------------------------------


@pytest.mark.parametrize("cell", ["nan", "NaN", "NA", "n/a"])
def test_an_unknown_class_or_patient_is_none(tmp_path, cell):
    columns = {"label": ["a", "b", cell, "a", "b", "a"]}
    message = refusal(table(tmp_path, columns))
    assert f"line 4: column 'label' has '{cell}', which is no name" in message
    named = table(tmp_path, columns) | {"classes": "a,b"}
    assert f"column 'label' has '{cell}'" in refusal(named)
    config = table(tmp_path, {"label": ["a", "b"] * 3, "who": ["p", "q", "r", cell, "t", cell]})
    config |= {"csv_label_column": "label", "csv_patient_column": "who"}
    assert f"line 5: column 'who' has '{cell}', which is no name" in refusal(config)
    grades = table(tmp_path, {"grade": [1, 2, 1, 2, cell, 1]})
    assert "line 6: column 'grade' has" in refusal(grades, task="ordinal")


def test_two_labels_that_are_one_number(tmp_path):
    config = table(tmp_path, {"label": ["1", "0", "1.0", "0", "1", "0"]})
    for task in ("", "classify", "ordinal"):
        message = refusal(config, task=task)
        assert "the labels '1' and '1.0' are the same number" in message
    named = config | {"classes": "0,1"}
    assert "2.png has the label '1.0', which is not one of data.classes" in refusal(named)
    names = [str(2**60), str(2**60 + 1)] * 3
    assert load_dataset(table(tmp_path, {"label": names}), 4).spec.classes == tuple(names[:2])


def test_measurements_are_no_classes_unless_it_is_said(tmp_path):
    halves = table(tmp_path, {"age": [1, 0.5, 1, 0.5, 1, 0.5]})
    message = refusal(halves)
    assert "the column 'age' holds numbers like 0.5: set task=regress" in message
    assert "or task=classify" in message
    assert load_dataset(halves, 4, task="classify").spec.classes == ("0.5", "1")
    assert load_dataset(halves, 4, task="regress").spec.classes == ("age",)
    assert load_dataset(halves | {"classes": "0.5,1"}, 4).spec.task == "classify"
    scored = load_dataset(halves, 4, classes=("1", "0.5"), splits=("test",))
    assert scored.splits["test"].target.tolist() == [0, 1]
    many = table(tmp_path, {"age": [*range(21)] * 2}, count=42)
    assert "holds 21 different numbers" in refusal(many)
    twenty = table(tmp_path, {"age": [*range(20)] * 3}, count=60)
    assert len(load_dataset(twenty, 4).spec.classes) == 20
    # As many names are classes, though.
    words = table(tmp_path, {"age": [f"c{n}" for n in range(21)] * 2}, count=42)
    assert len(load_dataset(words, 4).spec.classes) == 21


def test_a_numeric_class_without_training_image_may_be_a_number(tmp_path):
    config = table(tmp_path, {"age": [1, 2, 1, 2, 1, 7]})
    message = refusal(config)
    assert "class '7' has no image in the split train (numbers to predict need task=" in message


def test_a_table_without_test_rows_says_how_to_draw_them(tmp_path):
    config = table(tmp_path, {"label": ["a", "b"] * 5}, count=10)
    path = tmp_path / "list.csv"
    path.write_text(path.read_text().replace(",test,", ",train,"))
    advice = "no rows of split 'test': add some, or set data.csv_split_column='' to draw it"
    assert advice in refusal(config)
    drawn = load_dataset(config | {"csv_split_column": "", "val_fraction": 0.3}, 4)
    assert len(drawn.splits["test"]) == 2


# ---- which columns ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "task", "words"),
    [
        ({"csv_label_column": "a,gone"}, "", "column 'gone' is missing; columns: path, split, a"),
        ({"csv_label_column": "a,b,a"}, "", "names 'a' twice"),
        ({"csv_label_column": "a,"}, "", "has an empty name"),
        ({"csv_label_column": ""}, "", "csv_label_column is empty"),
        ({"csv_path_column": ""}, "", "csv_path_column is empty"),
        ({}, "classify", "task=classify takes one data.csv_label_column, not 2 (a, b)"),
        ({}, "ordinal", "task=ordinal takes one"),
        ({}, "segment", "task=segment needs data.csv_mask_column"),
        ({"csv_mask_column": "a"}, "regress", "csv_mask_column is for task=segment, not regress"),
        ({"csv_mask2_format": "{}"}, "", "csv_mask2_format is for task=segment, not multilabel"),
        ({"classes": "b,a"}, "", "data.classes (b, a) are not the columns"),
        ({"per_class": 1}, "", "the task multilabel has no class of an image"),
        ({"csv_path_format": "x/"}, "", "csv_path_format='x/' needs one {}"),
        ({"csv_path_format": "{}/{}"}, "", "csv_path_format='{}/{}' needs one {}"),
        ({"csv_path_format": ""}, "", "csv_path_format='' needs one {}"),
    ],
)
def test_mistakes_in_columns(tmp_path, change, task, words):
    config = table(tmp_path, {"a": ["0", "1"] * 3, "b": ["1", "0"] * 3})
    assert words in refusal(config | change, task=task)


# ---- a real set ---------------------------------------------------------------------------------


def test_real_findings(shared):
    path = shared / "data" / "chest_xray_nih224" / "labels.csv"
    if not path.is_file():
        pytest.skip("../shared/data/chest_xray_nih224 is not here")
    config = {
        "name": "csv",
        "dir": str(path),
        "csv_label_column": "Infiltration,Edema,Hernia",
        "csv_patient_column": "patient",
    }
    test = load_dataset(config, 16, classes=("Edema", "Hernia", "Infiltration"), splits=("test",))
    with open(path) as file:
        header, *rows = [line.strip().split(",") for line in file]
    columns = [header.index(name) for name in test.spec.classes]
    wanted = [[int(row[k]) for k in columns] for row in rows if row[1] == "test"]
    assert test.splits["test"].target.tolist() == wanted and len(wanted) == 202
