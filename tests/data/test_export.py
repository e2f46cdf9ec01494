"""One set in four forms is the same set; what a form cannot hold is refused or said."""

import itertools
import shlex
import subprocess
import sys

import numpy as np
import pytest

from medtl_jax.commands import run_tool
from medtl_jax.data.__main__ import main
from medtl_jax.data.catalog import Dataset, DataSpec, Split
from medtl_jax.data.export import KINDS, export_dataset
from medtl_jax.data.loader import training_indices
from medtl_jax.data.readers import load_dataset
from medtl_jax.data.streams import Streamed, stream_batches
from medtl_jax.errors import UserError

SIZE = 12
COUNTS = {"train": 9, "val": 3, "test": 6}
CLASSES = {
    "classify": ("adipose", "lymph", "stroma"),
    "ordinal": ("mild", "moderate", "grave"),
    "multilabel": ("edema", "mass"),
    "segment": ("background", "disc", "cup"),
    "regress": ("age", "bmi"),
}


def target_of(task, count, rng):
    """Random; every class in each split."""
    if task in ("classify", "ordinal"):
        return rng.permutation(np.arange(count) % 3).astype(np.int32)
    if task == "multilabel":
        return rng.integers(-1, 2, (count, 2), np.int8)
    if task == "segment":
        return rng.integers(0, 3, (count, SIZE, SIZE), np.uint8)
    numbers = rng.normal(40, 1e-3, (count, 2)).astype(np.float32)
    numbers[1, 0] = np.nan
    return numbers


def make_set(task="classify", channels=3, classes=None, second=False, patients=True):
    rng = np.random.default_rng(5)
    splits = {}
    for name, count in COUNTS.items():
        owners = np.array([f"{name} {row // 2}" for row in range(count)])
        masks = {"mask2": rng.integers(0, 3, (count, SIZE, SIZE), np.uint8)}
        splits[name] = Split(
            images=rng.integers(0, 256, (count, SIZE, SIZE, channels), np.uint8),
            target=target_of(task, count, rng),
            ids=np.array([f"{name}-{row}" for row in range(count)]),
            patients=owners if patients else None,
            extra=masks if second else {},
        )
    return Dataset(DataSpec("made", task, classes or CLASSES[task], licence="CC0"), splits)


def read_back(written, **more):
    config = {
        key.removeprefix("data."): value
        for key, value in written.config.items()
        if key.startswith("data.")
    }
    return load_dataset(config | more, SIZE, task=written.config["task"])


def path_for(folder, kind):
    return folder / ("made.npz" if kind == "npz" else f"made_{kind}")


def assert_same(dataset, expected, rows=slice(None)):
    assert dataset.spec.task == expected.spec.task
    assert dataset.spec.classes == expected.spec.classes
    assert list(dataset.splits) == list(expected.splits)
    for name, split in dataset.splits.items():
        wanted = expected.splits[name]
        np.testing.assert_array_equal(split.images[rows], wanted.images[rows], strict=True)
        np.testing.assert_array_equal(split.target[rows], wanted.target[rows], strict=True)


def batches_of(split):
    indices = training_indices(seed=3, first_step=0, steps=5, examples=len(split), batch_size=4)
    return list(stream_batches({"image": split.images, "target": split.target}, indices))


# ---- the same set --------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_four_forms_of_a_set_give_the_same_batches(tmp_path, channels):
    expected = make_set(channels=channels)
    for kind, cache in itertools.product(KINDS, (4.0, 0)):
        path = path_for(tmp_path, kind)
        if cache:
            written = export_dataset(expected, kind, path)
        dataset = read_back(written, cache_gb=cache)
        assert_same(dataset, expected)
        train = dataset.splits["train"]
        # An .npz cannot be read in parts.
        assert isinstance(train.images, Streamed) == (not cache and kind != "npz")
        for batch, wanted in zip(
            batches_of(train), batches_of(expected.splits["train"]), strict=True
        ):
            np.testing.assert_array_equal(batch["image"], wanted["image"], strict=True)
            np.testing.assert_array_equal(batch["target"], wanted["target"], strict=True)


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("kind", ["npz", "csv", "tfds"])
def test_every_task_comes_back(tmp_path, task, kind):
    expected = make_set(task)
    written = export_dataset(expected, kind, path_for(tmp_path, kind))
    for cache in (4.0, 0):
        dataset = read_back(written, cache_gb=cache)
        assert_same(dataset, expected)
        for name, split in dataset.splits.items():
            owners = expected.splits[name].patients
            if kind == "npz":
                assert split.patients is None
            else:
                np.testing.assert_array_equal(split.patients, owners)
    if kind == "tfds":
        assert dataset.splits["val"].ids.tolist() == ["val-0", "val-1", "val-2"]
        assert dataset.spec.licence == "CC0" and dataset.spec.name == "tfds/made_tfds"
    place = ("not written: patients (npz has no place for them)",)
    assert written.notes == (place if kind == "npz" else ())
    assert [child.name for child in tmp_path.iterdir()] == [written.path.name]


@pytest.mark.parametrize("kind", ["csv", "tfds"])
def test_masks_of_a_second_observer_come_back(tmp_path, kind):
    expected = make_set("segment", second=True)
    written = export_dataset(expected, kind, path_for(tmp_path, kind))
    for name, split in read_back(written).splits.items():
        np.testing.assert_array_equal(split.extra["mask2"], expected.splits[name].extra["mask2"])
    noted = export_dataset(expected, "npz", tmp_path / "made.npz").notes
    assert noted == ("not written: mask2, patients (npz has no place for them)",)


def test_a_streamed_set_is_written_as_one_in_memory(tmp_path):
    expected = make_set("segment")
    first = export_dataset(expected, "tfds", tmp_path / "first")
    streamed = read_back(first, cache_gb=0)
    done = []
    for kind in ("csv", "npz", "tfds"):
        written = export_dataset(
            streamed, kind, path_for(tmp_path, kind), lambda *told: done.append(told)
        )
        assert_same(read_back(written), expected)
    assert done[-1] == (18, 18, "writing images") and done[0] == (1, 18, "writing images")


def test_findings_that_are_all_known_are_integers_in_an_npz(tmp_path):
    dataset = make_set("multilabel")
    for split in dataset.splits.values():
        np.abs(split.target, out=split.target)
    written = export_dataset(dataset, "npz", tmp_path / "made.npz")
    with np.load(written.path) as file:
        assert file["train_labels"].dtype == np.uint8 and file["train_images"].dtype == np.uint8
        assert file["test_images"].shape == (6, SIZE, SIZE, 3)
        np.testing.assert_array_equal(file["val_labels"], dataset.splits["val"].target)
    assert_same(read_back(written), dataset)


def test_grey_images_of_three_channels_are_noted(tmp_path):
    dataset = make_set()
    for split in dataset.splits.values():
        split.images[:] = split.images[..., :1]
    written = export_dataset(dataset, "folder", tmp_path / "made")
    assert "every image is grey: PNG files come back with one channel" in written.notes
    assert read_back(written).splits["train"].images.shape == (9, SIZE, SIZE, 1)
    assert len(export_dataset(dataset, "npz", tmp_path / "made.npz").notes) == 1


def test_names_with_commas(tmp_path):
    sorted_names = make_set(classes=("cells (a, b)", "lymph", "stroma"))
    for kind in ("folder", "csv", "tfds"):
        written = export_dataset(sorted_names, kind, path_for(tmp_path, kind))
        assert "data.classes" not in written.config
        assert read_back(written).spec.classes == sorted_names.spec.classes
    shuffled = make_set(classes=("lymph", "cells (a, b)", "stroma"))
    for kind in ("folder", "csv", "npz"):
        with pytest.raises(UserError, match=r"comma in its name.* write the set as tfds"):
            export_dataset(shuffled, kind, tmp_path / "new.npz")
    with pytest.raises(UserError, match=r"'cells \(a, b\)' has a comma"):
        export_dataset(sorted_names, "npz", tmp_path / "new.npz")


# ---- refusals ------------------------------------------------------------------------------------


def without_a_class():
    dataset = make_set()
    dataset.splits["val"].target[:] = 0
    return dataset


def with_a_patient(name):
    dataset = make_set()
    dataset.splits["val"].patients[0] = name
    return dataset


@pytest.mark.parametrize(
    ("kind", "name", "dataset", "words"),
    [
        ("zip", "new", make_set(), "unknown kind 'zip': choose from folder, npz, csv, tfds"),
        ("npz", "new.zip", make_set(), "ends in .npz"),
        ("tfds", "New-Set", make_set(), "'New-Set' cannot be the name of a TFDS set"),
        ("folder", "new", make_set("regress"), "task=regress: class folders hold the class"),
        ("folder", "new", make_set(classes=("a", "b/../c", "d")), "'b/../c' cannot be the name of"),
        (
            "folder",
            "new",
            make_set(classes=("a", ".b", "d")),
            "'.b' cannot be the name of",
        ),
        ("folder", "new", without_a_class(), "the split val has no image of class 'lymph'"),
        ("csv", "new", make_set(classes=("a", "b ", "c")), "the class 'b ' is empty, starts"),
        ("npz", "new.npz", make_set(classes=("a", "b\n", "c")), "the class 'b\\n' is empty"),
        ("csv", "new", make_set(classes=("a", "b", "NA")), "would read the name 'NA' as a missing"),
        ("csv", "new", with_a_patient("nan"), "would read the name 'nan' as a missing one"),
        ("npz", "new.npz", make_set("regress", classes=("a,b", "c")), "'a,b' has a comma in its n"),
        ("csv", "new", make_set("regress", classes=("age", "path")), "'path' cannot be the name"),
        ("csv", "new", make_set("multilabel", classes=("a,b", "c")), "'a,b' cannot be the name"),
        ("csv", "new", make_set("segment", classes=("a", "b,c", "d")), "a comma in its name"),
    ],
)
def test_what_a_form_cannot_hold_is_refused(tmp_path, kind, name, dataset, words):
    with pytest.raises(UserError) as caught:
        export_dataset(dataset, kind, tmp_path / name)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, kind):
    path = path_for(tmp_path / "sets", kind)

    def full_disk(done, total, text):
        if done >= total // 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device; free some space"):
        export_dataset(make_set(), kind, path, full_disk)
    assert list(path.parent.iterdir()) == []
    path.mkdir()
    with pytest.raises(UserError, match="exists: it is not overwritten"):
        export_dataset(make_set(), kind, path)
    assert list(path.iterdir()) == []


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_says_how_to_read_what_it_wrote(tmp_path, capsys):
    source = ["name=phantom", "phantom.train=8", "phantom.val=4", "phantom.test=4"]
    source += ["phantom.domain=b"]
    first, second = tmp_path / "first", tmp_path / "a set"
    arguments = ["export", "tfds", str(first), "--size=32", "--task=segment", *source]
    assert run_tool(main, arguments) == 0
    told = capsys.readouterr().out
    assert f"written   {first}: train 8, val 4, test 4" in told
    flags = dict(flag.split("=", 1) for flag in shlex.split(told.splitlines()[-1])[2:])
    assert flags == {
        "--config.task": "segment",
        "--config.data.name": "tfds/first",
        "--config.data.dir": str(tmp_path),
    }
    source = ["name=tfds/first", f"dir={tmp_path}", "cache_gb=0.000001", "bit_depth=8"]
    assert run_tool(main, ["export", "csv", str(second), "--size=32", *source]) == 0
    assert "stream from their files" in capsys.readouterr().out
    made = {"name": "phantom", "phantom": {"train": 8, "val": 4, "test": 4, "domain": "b"}}
    config = {
        "name": "csv",
        "dir": str(second / "labels.csv"),
        "csv_mask_column": "mask",
        "csv_mask_format": "masks/{}",
        "classes": "background,lesion",
    }
    assert_same(load_dataset(config, 32), load_dataset(made, 32, task="segment"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "npz", "x.npz", "--size=8", "nam=phantom"], "'nam=phantom' is no KEY=VALUE"),
        (["export", "npz", "x.npz", "--size=8", "phantom"], "'phantom' is no KEY=VALUE"),
        (["export", "npz", "x.npz", "--size=8", "fold=a"], "fold=a must be an integer"),
        (["export", "npz", "x.npz", "--size=8", "cache_gb=a"], "cache_gb=a must be a number"),
        (["export", "zip", "x", "--size=8", "name=phantom"], "invalid choice: 'zip'"),
        (["export", "npz", "x.npz", "name=phantom"], "required: --size"),
        ([], "required: export"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, words, capsys):
    assert run_tool(main, arguments) == 2
    told = capsys.readouterr().err
    assert words in told and told.startswith("error: ") and told.count("\n") == 1


CHILD = """
import pathlib, sys
from medtl_jax.commands import run_tool
from medtl_jax.data.__main__ import main
from medtl_jax.data.readers import load_dataset
folder = pathlib.Path(sys.argv[1])
made = ["name=phantom", "phantom.train=8", "phantom.val=4", "phantom.test=4"]
assert run_tool(main, ["export", "tfds", str(folder / "made"), "--size=32", *made]) == 0
dataset = load_dataset({"name": "tfds/made", "dir": str(folder)}, 32)
print(dataset.splits["train"].images.shape, "tensorflow" in sys.modules)
"""


def test_no_tensorflow_is_needed_and_nothing_warns(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines()[-1] == "(8, 32, 32, 1) False"
    assert len(done.stdout.splitlines()) == 4
