"""Test-time augmentation and corruptions of a small run, and what evaluating it again says."""

import pathlib
import shutil

import digit_runs
import jax
import numpy as np
import pytest
from PIL import Image

from configs import default
from experiments.robustness import Robustness, corrupted, measure_robustness
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.augment.corruptions import NAMES, corrupt
from medtl_jax.augment.presets import TRANSFORMS
from medtl_jax.data.phantom import CLASSES, make_phantom
from medtl_jax.data.streams import Streamed
from medtl_jax.report.robustness import corruptions_text, tta_text

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDY = f"--config={ROOT / 'configs' / 'finetune.py'}"
TINY = {
    "model.name": "lenet5",
    "model.weights": "none",
    "model.image_size": 32,
    "data.phantom.train": 48,
    "data.phantom.val": 16,
    "data.phantom.test": 24,
    "data.batch_size": 16,
    "train.epochs": 3,
    "train.min_steps": 0,
    "eval.batch_size": 16,
    "eval.resamples": 30,
    **{f"augment.{name}": 0.0 for name in TRANSFORMS},
    "augment.flip_horizontal": 0.5,
    "augment.noise": 0.1,
}
ASKED = {"eval__tta": 3, "eval__corruptions": True}


def command(workdir, **settings) -> list[str]:
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    keys = [f"--config.{key}={value}" for key, value in {**TINY, **changes}.items()]
    return ["launch.py", STUDY, f"--workdir={workdir}", *keys]


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """As in launch.py: optax mixes types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def trained(launch, no_pictures, tmp_path_factory) -> pathlib.Path:
    """The folder of a run with both measurements."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert launch.run_command(command(folder, **ASKED)) == 0
    return folder


@pytest.fixture
def evaluate(launch, trained, tmp_path):
    """`evaluate(name, **settings) -> folder` of an evaluation of the run."""

    def run(name: str, **settings) -> pathlib.Path:
        chosen = {"experiment": "evaluate", "eval__run": trained, **settings}
        assert launch.run_command(command(tmp_path / name, **chosen)) == 0
        return tmp_path / name

    return run


def read(folder: pathlib.Path, name: str) -> dict:
    return runs.read_json(folder / f"{name}.json")


def values(entries: dict) -> dict[str, float]:
    return {name: entry["value"] for name, entry in entries.items()}


def write_folder(root: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> pathlib.Path:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / "test" / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / f"{number:02}.png")
    return root


def test_the_headline_numbers_are_those_without(trained, evaluate):
    plain = evaluate("plain")
    assert not (plain / "tta.json").exists() and not (plain / "corruptions.json").exists()
    assert values(read(plain, "metrics")["test"]) == pytest.approx(
        values(read(trained, "metrics")["test"]), abs=1e-6, nan_ok=True
    )
    with (
        np.load(plain / "predictions.npz") as ours,
        np.load(trained / "predictions.npz") as theirs,
    ):
        np.testing.assert_allclose(ours["test_score"], theirs["test_score"], atol=1e-6)


def test_the_gain_is_the_difference_of_both(trained):
    card, metrics = read(trained, "tta"), values(read(trained, "metrics")["test"])
    assert card["split"] == "test" and card["views"] == 3 and card["n"] == 24
    assert card["transforms"] == {"flip_horizontal": 0.5, "noise": 0.1}
    assert card["primary"] == ["auc", "accuracy"]
    defined = {name: entry for name, entry in card["metrics"].items() if metrics[name] is not None}
    assert {"auc", "accuracy", "nll"} <= defined.keys()
    for name, entry in defined.items():
        assert entry["plain"] == pytest.approx(metrics[name], abs=1e-9)
        assert entry["difference"] == pytest.approx(entry["tta"] - entry["plain"], abs=1e-12)
        if entry["ci95"] is not None:
            assert entry["ci95"][0] <= entry["difference"] <= entry["ci95"][1]
    assert abs(card["metrics"]["nll"]["difference"]) > 1e-4


def test_a_finished_run_says_them_again(launch, trained, tmp_path, capfd):
    folder = shutil.copytree(trained, tmp_path / "run")
    assert launch.run_command(command(folder, **ASKED)) == 0
    said = capfd.readouterr().out
    for lines in (tta_text(read(folder, "tta")), corruptions_text(read(folder, "corruptions"))):
        assert lines in said
    (folder / "tta.json").write_text("{}")
    assert launch.run_command(command(folder, **ASKED)) == 2
    assert "tta.json is damaged; delete it" in capfd.readouterr().err


def test_an_evaluation_gives_the_same_whatever_the_batch(trained, evaluate):
    folder = evaluate("batch", eval__tta=3, eval__batch_size=4, train__devices=2)
    ours, theirs = (read(one, "tta")["metrics"] for one in (folder, trained))
    assert [*ours] == [*theirs] and not (folder / "corruptions.json").exists()
    for name, entry in ours.items():
        assert entry["tta"] == pytest.approx(theirs[name]["tta"], abs=1e-4)


def test_what_is_measured_is_the_damaged_images(trained, evaluate, tmp_path):
    card = read(trained, "corruptions")
    metrics = read(trained, "metrics")["test"]
    assert card["severities"] == [1, 2, 3, 4, 5]
    assert card["clean"] == {name: metrics[name] for name in card["clean"]}
    assert {"accuracy", "auc"} <= card["clean"].keys()
    split = make_phantom(32, train=48, val=16, test=24, splits=("test",)).splits["test"]
    for name, severity in (("noise", 5), ("bias_field", 3), ("contrast", 1)):
        images = corrupt(name, severity, split.images, 0, split.ids)
        root = write_folder(tmp_path / name, images, split.target)
        folder = evaluate(f"{name}_run", data__name="folder", data__dir=root)
        wanted = values(read(folder, "metrics")["test"])
        found = values(card["corruptions"][name][severity - 1])
        assert found == pytest.approx({key: wanted[key] for key in found}, abs=1e-5, nan_ok=True)
    # They are not the clean ones.
    assert values(card["corruptions"]["noise"][4])["nll"] != values(card["clean"])["nll"]


def test_streamed_images_are_damaged_block_by_block(trained, evaluate, tmp_path):
    split = make_phantom(32, train=48, val=16, test=24, splits=("test",)).splits["test"]
    root = write_folder(tmp_path / "set", split.images, split.target)
    streamed = evaluate(
        "streamed", data__name="folder", data__dir=root, data__cache_gb=0.0, **ASKED
    )
    assert "stream from their files" in (streamed / "environment.json").read_text()
    assert read(streamed, "tta")["n"] == 24
    ours, theirs = (read(folder, "corruptions")["corruptions"] for folder in (streamed, trained))
    assert [*ours] == list(NAMES)
    # The others draw by the ids, which are those of the files.
    for name in ("blur", "contrast", "jpeg"):
        for one, other in zip(ours[name], theirs[name], strict=True):
            assert values(one) == pytest.approx(values(other), abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("name", ["noise", "bias_field"])
def test_an_image_is_damaged_alike_streamed_or_held(name):
    rng = np.random.default_rng(0)
    images, ids = rng.integers(0, 256, (7, 12, 10, 3), np.uint8), [f"{i}.png" for i in range(7)]
    wanted = corrupt(name, 4, images, 3, ids)
    held = corrupted(images, ids, name, 4, 3)
    assert isinstance(held, np.ndarray) and held.dtype == np.uint8
    np.testing.assert_array_equal(held, wanted)
    read_rows = []

    def decode(row):
        read_rows.append(row)
        return images[row]

    streamed = corrupted(Streamed(range(7), decode, (12, 10, 3)), ids, name, 4, 3)
    assert isinstance(streamed, Streamed) and not read_rows
    np.testing.assert_array_equal(streamed[[5, 2]], wanted[[5, 2]])
    assert sorted(read_rows) == [2, 5]


def test_masks_are_averaged_over_flips_alone(launch, no_pictures, tmp_path, capfd):
    masks = {"task": "segment", "model__decoder": "4,4,4", "train__epochs": 1}
    small = {f"data__phantom__{split}": 16 for split in ("train", "val", "test")}
    assert launch.run_command(command(tmp_path / "run", **masks, **small, **ASKED)) == 0
    card = read(tmp_path / "run", "tta")
    assert card["transforms"] == {"flip_horizontal": 0.5} and card["primary"] == ["dice"]
    metrics = read(tmp_path / "run", "metrics")["test"]
    assert card["metrics"]["dice"]["plain"] == pytest.approx(metrics["dice"]["value"])
    assert card["metrics"]["hd95"]["plain"] == pytest.approx(metrics["hd95"]["value"])
    damaged = read(tmp_path / "run", "corruptions")
    assert {"dice", "iou"} <= damaged["clean"].keys()
    assert not {"hd95", "nsd"} & damaged["corruptions"]["noise"][0].keys()
    printed = capfd.readouterr().out
    assert "test-time augmentation, 3 views, test split" in printed
    assert "dice by severity of a corruption, test split" in printed


def make_request(folder: pathlib.Path, brief: bool, **sections) -> Request:
    config = {**default.get_config().to_dict(), **sections}
    config["eval"] |= {"tta": 3, "corruptions": True}
    return Request(config, folder, "python launch.py", digit_runs.Notes(), brief=brief)


def test_a_brief_run_measures_neither(tmp_path):
    # Without a network anything that is measured fails.
    request = make_request(tmp_path, brief=True)
    assert measure_robustness(request, None, {}, {}, "test") == Robustness()
    assert not any(tmp_path.iterdir()) and not request.console.lines


def test_a_target_without_test_labels_is_told_of(tmp_path):
    domain = default.get_config().domain.to_dict()
    domain["target"] = {"name": "npz", "dir": "usps.npz"}
    request = make_request(tmp_path, brief=False, domain=domain)
    found = measure_robustness(request, None, {}, {}, "source_test")
    (note,) = found.notes
    assert note.startswith("Nothing measured for eval.tta and eval.corruptions: the target's test")
    assert request.console.lines == [f"note: {note}"] and not any(tmp_path.iterdir())
    assert found.tta is None and found.corruptions is None and found.figures() == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eval__tta": 1}, "eval.tta=1 would be the image alone"),
        ({"eval__tta": 3, "augment__rotate": 5.0}, "augment.rotate=5.0 has no effect: the model"),
    ],
)
def test_evaluate_refuses_views_that_cannot_be_had(
    launch, trained, tmp_path, capfd, settings, words
):
    capfd.readouterr()
    chosen = {"experiment": "evaluate", "eval__run": trained, **settings}
    assert launch.run_command(command(tmp_path / "new", **chosen)) == 2
    error = capfd.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "new").exists()
