"""Test-time augmentation and corruptions of a small run, and what evaluating it again says."""

import csv
import dataclasses
import pathlib
import shutil

import digit_runs
import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score

from configs import default
from experiments.augmentation import augments_training
from experiments.robustness import Robustness, corrupted, measure_robustness
from experiments.study import Request
from medtl_jax import runs
from medtl_jax.augment.corruptions import NAMES, corrupt
from medtl_jax.augment.presets import TRANSFORMS
from medtl_jax.data.phantom import CLASSES, make_phantom
from medtl_jax.data.streams import Streamed
from medtl_jax.metrics.compare import compare_runs
from medtl_jax.metrics.pairing import Predicted
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
SMALL = {f"data__phantom__{split}": 16 for split in ("train", "val", "test")}


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


def test_the_averaged_scores_stay_in_the_folder(trained):
    card = read(trained, "tta")["metrics"]
    with np.load(trained / "tta.npz") as found, np.load(trained / "predictions.npz") as plain:
        assert set(found) == {name for name in plain if name.startswith("test_")}
        np.testing.assert_array_equal(found["test_id"], plain["test_id"])
        score, target = found["test_score"], found["test_target"]
        assert np.abs(score - plain["test_score"]).max() > 1e-4
    assert accuracy_score(target, score.argmax(1)) == card["accuracy"]["tta"]
    probability = score[np.arange(24), target].astype(float)
    assert -np.log(probability).mean() == pytest.approx(card["nll"]["tta"], abs=1e-5)


def predicted(folder: pathlib.Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Head, paths and numbers of a table of predictions."""
    head, *rows = csv.reader((folder / "predictions.csv").read_text().splitlines())
    first = head.index(CLASSES[0])
    return head, [row[0] for row in rows], np.array([row[first:] for row in rows], float)


def test_predict_averages_as_was_measured(launch, trained, evaluate, tmp_path, capfd):
    split = make_phantom(32, train=48, val=16, test=24, splits=("test",)).splits["test"]
    root = write_folder(tmp_path / "set", split.images, split.target)
    measured = evaluate("measured", data__name="folder", data__dir=root, eval__tta=3)
    capfd.readouterr()
    folders = [tmp_path / "averaged", tmp_path / "plain"]
    for folder, views in zip(folders, (3, 0), strict=True):
        asked = {"experiment": "predict", "eval__run": trained, "data__dir": root}
        assert launch.run_command(command(folder, **asked, eval__tta=views)) == 0
    said = capfd.readouterr().out
    assert f"24 images, averaged over 3 views of each: {folders[0]}" in said
    assert f"24 images: {folders[1]}" in said
    (head, paths, averaged), (plain_head, _, plain) = map(predicted, folders)
    assert head == ["path", "averaged_views", "predicted", *CLASSES]
    assert plain_head == ["path", "predicted", *CLASSES]
    with np.load(measured / "tta.npz") as found:
        place = [found["test_id"].tolist().index(path) for path in paths]
        np.testing.assert_allclose(averaged, found["test_score"][place], atol=2e-6)
    assert np.abs(averaged - plain).max() > 1e-4


@pytest.fixture
def whole_patients(tmp_path) -> pathlib.Path:
    """A csv of the phantom's test split with four images of each of six patients."""
    split = make_phantom(32, train=48, val=16, test=24, splits=("test",)).splits["test"]
    rows = ["path,split,label,patient"]
    for number, (image, label) in enumerate(zip(split.images, split.target, strict=True)):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{number:02}.png")
        rows.append(f"{number:02}.png,test,{CLASSES[label]},p{number // 4}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    return tmp_path / "list.csv"


def test_the_interval_resamples_whole_patients(trained, evaluate, whole_patients):
    table = {"data__name": "csv", "data__dir": whole_patients, "eval__tta": 3}
    folder = evaluate("patients", **table, data__csv_patient_column="patient")
    card = read(folder, "tta")
    assert (card["n"], card["n_patients"]) == (24, 6)
    with np.load(folder / "predictions.npz") as plain, np.load(folder / "tta.npz") as averaged:
        assert len(set(averaged["test_patient"])) == 6
        both = [
            Predicted(name, "classify", CLASSES, *(found[f"test_{key}"] for key in (
                "id", "target", "score", "patient")))
            for name, found in (("plain", plain), ("tta", averaged))
        ]  # fmt: skip
    (wanted,) = compare_runs(both, resamples=30, seed=0)
    (images,) = compare_runs(
        [dataclasses.replace(one, patients=None) for one in both], resamples=30, seed=0
    )
    found = card["metrics"]["nll"]
    assert found["ci95"] == pytest.approx(wanted.metrics["nll"].interval, abs=1e-9)
    assert found["ci95"] != pytest.approx(images.metrics["nll"].interval, abs=1e-9)
    for name, entry in card["metrics"].items():
        if entry["ci95"] is not None:
            assert entry["ci95"] == pytest.approx(wanted.metrics[name].interval, abs=1e-9)


def test_it_is_said_whether_the_training_was_drawn_so():
    config = default.get_config().to_dict()
    config["experiment"] = "finetune"
    assert augments_training(config)
    kept = {**config, "transfer": {**config["transfer"], "cache": "prefix"}}
    assert not augments_training(kept)
    drawn = {**kept, "transfer": {**kept["transfer"], "views": 2}}
    assert augments_training(drawn)


def test_an_evaluated_probe_was_not_trained_on_drawn_images(trained, evaluate, tmp_path):
    assert read(trained, "tta")["trained"] is True
    # As if a probe on kept features had been trained: its run says so, an evaluation does not.
    probe = shutil.copytree(trained, tmp_path / "probe")
    config = runs.read_json(probe / "config.json")
    runs.write_json(probe / "config.json", {**config, "experiment": "extract"} | {
        "eval": {**config["eval"], "tta": 0, "corruptions": False}})  # fmt: skip
    assert read(evaluate("of_probe", eval__run=probe, eval__tta=2), "tta")["trained"] is False


def test_an_evaluation_of_an_adapted_run_is_measured(launch, no_pictures, tmp_path, capfd):
    """Its `val` is no stand-in for a target without test labels."""
    adapted = {
        "model__name": "lenet5_bn", "domain__target__name": "phantom",
        "domain__method": "mmd", "train__epochs": 1, **SMALL,
    }  # fmt: skip
    assert launch.run_command(command(tmp_path / "run", **adapted)) == 0
    asked = {"experiment": "evaluate", "eval__run": tmp_path / "run", "eval__splits": "val"}
    own = {key: value for key, value in adapted.items() if key.startswith(("data", "model"))}
    capfd.readouterr()
    assert launch.run_command(command(tmp_path / "val", **own, **asked, eval__tta=2)) == 0
    assert "no labels" not in capfd.readouterr().out
    card = read(tmp_path / "val", "tta")
    assert card["split"] == "val" and card["n"] == 16


def test_masks_are_averaged_over_what_leaves_pixels_whole(launch, no_pictures, tmp_path, capfd):
    masks = {"task": "segment", "model__decoder": "4,4,4", "train__epochs": 1}
    assert launch.run_command(command(tmp_path / "run", **masks, **SMALL, **ASKED)) == 0
    card = read(tmp_path / "run", "tta")
    assert card["transforms"] == {"flip_horizontal": 0.5, "noise": 0.1}
    assert card["primary"] == ["dice"]
    metrics = read(tmp_path / "run", "metrics")["test"]
    assert card["metrics"]["dice"]["plain"] == pytest.approx(metrics["dice"]["value"])
    assert card["metrics"]["hd95"]["plain"] == pytest.approx(metrics["hd95"]["value"])
    damaged = read(tmp_path / "run", "corruptions")
    assert {"dice", "iou"} <= damaged["clean"].keys()
    assert not {"hd95", "nsd"} & damaged["corruptions"]["noise"][0].keys()
    printed = capfd.readouterr().out
    assert "test-time augmentation, 3 views, test split" in printed
    assert "dice by severity of a corruption, test split" in printed
    # Masks that are predicted with views are those of the averaged scores.
    split = make_phantom(32, train=16, val=16, test=16, splits=("test",)).splits["test"]
    root = write_folder(tmp_path / "set", split.images, np.zeros(16, int))
    asked = {"experiment": "predict", "eval__run": tmp_path / "run", "data__dir": root}
    for name, views in (("averaged", 3), ("plain", 0)):
        assert launch.run_command(command(tmp_path / name, **asked, eval__tta=views)) == 0
    head = (tmp_path / "averaged" / "predictions.csv").read_text().splitlines()[0]
    assert head.startswith("path,averaged_views,mask,")
    masks = [
        np.stack(
            [np.asarray(Image.open(path)) for path in sorted((tmp_path / name).rglob("*.png"))]
        )
        for name in ("averaged", "plain")
    ]
    with np.load(tmp_path / "run" / "tta.npz") as found:
        foreground = found["test_score"].argmax(-1)
    assert masks[0].shape == foreground.shape
    # The draws are of other ids, and few pixels are that near to the boundary.
    assert ((masks[0] > 0) == (foreground > 0)).mean() > 0.8
    assert (masks[0] != masks[1]).mean() < 0.5


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
