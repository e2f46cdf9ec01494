"""What evaluate scores of the data of the run itself: never an image that it was trained on."""

import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from medtl_jax import runs
from medtl_jax.data.export import export_dataset
from medtl_jax.data.phantom import make_phantom
from medtl_jax.data.readers import load_dataset

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDY = f"--config={ROOT / 'configs' / 'finetune.py'}"
TINY = {
    "model.name": "lenet5",
    "model.weights": "none",
    "model.image_size": 32,
    "train.epochs": 1,
    "train.min_steps": 0,
    "data.batch_size": 16,
    "eval.batch_size": 16,
    "eval.resamples": 20,
}


def command(folder: pathlib.Path, **settings) -> list[str]:
    """The command line of the tiny study; `a__b=value` sets `a.b`."""
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    keys = [f"--config.{key}={value}" for key, value in {**TINY, **changes}.items()]
    return ["launch.py", STUDY, f"--workdir={folder}", *keys]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> pathlib.Path:
    """A table of 60 images of 30 patients, without splits."""
    root = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(0)
    lines = ["path,label,kind,patient,split"]
    for number in range(60):
        pixels = rng.integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02}.png")
        split = "test" if number >= 48 else "train"
        kind = "ab"[number // 2 % 2]
        lines.append(f"{number:02}.png,{kind},{kind},p{number // 2},{split}")
    (root / "table.csv").write_text("\n".join(lines))
    return root / "table.csv"


def of_table(table: pathlib.Path, **more) -> dict:
    """The settings of the run on the last of three folds, by patient."""
    return {
        "data__name": "csv",
        "data__dir": table,
        "data__csv_split_column": "",
        **more,
    }


FOLD = {"data__folds": 3, "data__fold": 2, "data__csv_patient_column": "patient"}


@pytest.fixture(scope="module")
def run_folder(launch, no_pictures, table, tmp_path_factory) -> pathlib.Path:
    """The folder of a run on a fold of the table."""
    folder = tmp_path_factory.mktemp("fold") / "run"
    with jax.numpy_dtype_promotion("standard"):
        assert launch.run_command(command(folder, **of_table(table, **FOLD))) == 0
    return folder


@pytest.fixture
def evaluate(launch, no_pictures, run_folder, tmp_path):
    """`evaluate(**settings) -> predictions` of the run's model on what the settings say."""

    def run(**settings) -> dict[str, np.ndarray]:
        folder = tmp_path / f"evaluated{len(list(tmp_path.iterdir()))}"
        asked = {"experiment": "evaluate", "eval__run": run_folder, **settings}
        assert launch.run_command(command(folder, **asked)) == 0
        with np.load(folder / "predictions.npz") as arrays:
            return dict(arrays)

    return run


@pytest.fixture
def refused(launch, run_folder, tmp_path, capfd):
    """`refused(**settings) -> message` of the evaluation."""

    def run(**settings) -> str:
        asked = {"experiment": "evaluate", "eval__run": run_folder, **settings}
        capfd.readouterr()
        assert launch.run_command(command(tmp_path / "new", **asked)) == 2
        error = capfd.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    return run


def trained_on(run_folder: pathlib.Path) -> set[str]:
    """The names of the images in the run's train."""
    data = runs.read_json(run_folder / "config.json")["data"]
    return set(load_dataset(data, 32).splits["train"].ids.tolist())


def test_the_fold_of_a_run_is_evaluated_on_what_it_was_not_trained_on(evaluate, run_folder, table):
    with np.load(run_folder / "predictions.npz") as own:
        wanted = {name: own[name] for name in own.files}
    # Nothing here says that there were folds, or patients, or that the split is to be drawn.
    found = evaluate(data__name="csv", data__dir=table)
    assert not set(found["test_id"].tolist()) & trained_on(run_folder)
    np.testing.assert_array_equal(found["test_id"], wanted["test_id"])
    np.testing.assert_allclose(found["test_score"], wanted["test_score"], atol=1e-6)
    assert len(found["test_id"]) == 20
    again = evaluate(**of_table(table), eval__splits="val,test")
    for name in ("val_id", "test_id"):
        np.testing.assert_array_equal(again[name], wanted[name])


@pytest.mark.parametrize(
    "change",
    [
        {"data__fold": 1},
        {"data__folds": 4},
        {"data__seed_split": 1},
        {"data__csv_split_column": "split"},
        {"data__csv_patient_column": "kind"},
        {"data__csv_label_column": "kind"},
    ],
)
def test_another_division_of_the_same_table_is_refused(refused, table, change):
    ((key, _),) = change.items()
    message = refused(**{**of_table(table, **FOLD), **change})
    assert key.replace("__", ".") in message and "was trained on: that run had" in message


def test_a_link_to_the_table_is_the_same_table_and_a_copy_is_not(
    evaluate, refused, table, tmp_path
):
    os.symlink(table.parent, tmp_path / "link")
    link = of_table(tmp_path / "link" / "table.csv", data__folds=3, data__fold=1)
    assert "data.fold=1 could score images" in refused(**link)
    shutil.copytree(table.parent, tmp_path / "other")
    copy = of_table(tmp_path / "other" / "table.csv", data__folds=3, data__fold=1)
    assert len(evaluate(**copy)["test_id"]) == 20


@pytest.fixture
def same_source(launch):
    """The function, which is found once `launch` is."""
    from experiments.trained import same_source

    return same_source


def section(name: str, place="") -> dict:
    return {"name": name, "dir": str(place)}


def test_two_names_of_a_tfds_set_are_one_source(same_source, tmp_path):
    dataset = make_phantom(32, train=4, val=4, test=4)
    export_dataset(dataset, "tfds", tmp_path / "set")
    one, pinned = section("tfds/set", tmp_path), section("tfds/set:1.0.0", tmp_path)
    assert same_source(one, pinned) and same_source(pinned, one)
    # The newest version is another one now: what was read then tells.
    shutil.copytree(tmp_path / "set" / "1.0.0", tmp_path / "set" / "1.1.0")
    assert not same_source(pinned, one)
    assert same_source(pinned, one, str(tmp_path / "set" / "1.0.0"))
    assert not same_source(pinned, section("tfds/other", tmp_path))


def test_two_names_of_a_file_are_one_source(same_source, tmp_path):
    published, file = "medmnist/breastmnist", tmp_path / "breastmnist.npz"
    assert same_source(section("npz", file), section(published, tmp_path))
    assert same_source(section(published, tmp_path), section("npz", file))
    assert not same_source(section("npz", tmp_path / "other.npz"), section(published, tmp_path))
    assert not same_source(section("medmnist/octmnist", tmp_path), section(published, tmp_path))


def test_the_phantom_has_no_place(same_source, tmp_path):
    assert same_source(section("phantom"), section("phantom", tmp_path))
    assert not same_source(section("phantom"), section("folder"))
    for place in ("\0", "x" * 5000):
        assert not same_source(section("folder", tmp_path), section("folder", place))
