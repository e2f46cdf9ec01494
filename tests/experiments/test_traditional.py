"""Runs without a network: what they write, who takes them, what is refused."""

import json
import shutil

import numpy as np
import pytest
from digit_runs import ROOT, Notes, history, make_request, run, scores
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from medtl_jax import runs
from medtl_jax.errors import UserError
from medtl_jax.traditional.descriptors import DESCRIPTORS

pytestmark = pytest.mark.usefixtures("small_runs")


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    from medtl_jax.traditional import classifiers

    monkeypatch.setattr(classifiers, "TREES", 15)


@pytest.fixture(scope="module")
def by_hog(five, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hog") / "run"
    return run(folder, five, None, transfer__strategy="hog_logistic")


def arrays(data):
    with np.load(data) as found:
        return dict(found)


def changed(data, folder, **more):
    """A copy of a set with some arrays changed."""
    folder.mkdir()
    np.savez(folder / "digits.npz", **{**arrays(data), **more})
    return folder / "digits.npz"


def test_a_run_has_the_scores_of_scikit_learn_called_directly(by_hog, five):
    data = arrays(five)
    vectors = {
        split: np.stack([DESCRIPTORS["hog"](x[..., None]) for x in data[f"{split}_images"]])
        for split in ("train", "test")
    }
    (record,) = history(by_hog)
    scaler = StandardScaler().fit(vectors["train"])
    model = LogisticRegression(C=record["C"], max_iter=500)
    model.fit(scaler.transform(vectors["train"]), data["train_labels"].ravel())
    wanted = model.predict_proba(scaler.transform(vectors["test"]))
    np.testing.assert_allclose(scores(by_hog), wanted, rtol=1e-3, atol=1e-5)
    metrics = runs.read_json(by_hog / runs.METRICS)["test"]
    right = wanted.argmax(axis=1) == data["test_labels"].ravel()
    assert metrics["accuracy"]["value"] == pytest.approx(right.mean()) and right.mean() > 0.7
    low, high = metrics["accuracy"]["ci95"]
    assert low <= right.mean() <= high and metrics["accuracy"]["n"] == 30


def test_a_run_folder_is_that_of_other_runs(by_hog):
    names = {path.name for path in by_hog.iterdir()}
    wanted = {"config.json", "environment.json", "metrics.json", "metrics.jsonl", "cost.json"}
    assert wanted | {"predictions.npz", "calibration.json"} <= names
    assert not names & {"checkpoints", runs.WEIGHTS}
    cost = runs.read_json(by_hog / runs.COST)
    assert cost["prepare_seconds"] > 0 and cost["train_seconds"] == 0
    environment = runs.read_json(by_hog / runs.ENVIRONMENT)
    assert environment["packages"]["scikit-image"] and environment["weights_sha256"] == ""
    assert environment["audit"]["images"].keys() == {"train", "val", "test"}


@pytest.mark.parametrize("classifier", ["logistic", "svm", "forest"])
@pytest.mark.parametrize("features", ["lbp", "pixels"])
def test_every_pair_is_a_strategy_and_equal_by_seed(five, tmp_path, features, classifier):
    strategy = f"{features}_{classifier}"
    one = run(tmp_path / "one", five, None, transfer__strategy=strategy)
    keys = {"experiment": "traditional", "model__weights": "none"}
    other = run(
        tmp_path / "other",
        five,
        None,
        traditional__features=features,
        traditional__classifier=classifier,
        **keys,
    )
    np.testing.assert_array_equal(scores(one), scores(other))
    assert history(one) == history(other)
    assert runs.read_json(one / runs.METRICS)["test"]["accuracy"]["value"] > 0.3


def test_the_test_split_has_no_part_in_what_is_chosen(by_hog, five, tmp_path):
    test = arrays(five)
    data = changed(
        five,
        tmp_path / "labels",
        test_labels=(test["test_labels"] + 1) % 5,
    )
    found = run(tmp_path / "run", data, None, transfer__strategy="hog_logistic")
    assert history(found) == history(by_hog)
    np.testing.assert_array_equal(scores(found), scores(by_hog))
    assert runs.read_json(found / runs.CALIBRATION) == runs.read_json(by_hog / runs.CALIBRATION)
    accuracy = [
        runs.read_json(f / runs.METRICS)["test"]["accuracy"]["value"] for f in (found, by_hog)
    ]
    assert accuracy[0] < accuracy[1]
    # Validation has: with its labels turned, another penalty or another loss.
    val = changed(five, tmp_path / "val", val_labels=(test["val_labels"] + 1) % 5)
    other = run(tmp_path / "other", val, None, transfer__strategy="hog_logistic")
    assert history(other)[0]["C"] < history(by_hog)[0]["C"]


def test_descriptors_are_kept_and_a_run_is_not_made_twice(by_hog, five, tmp_path, monkeypatch):
    from experiments import traditional

    kept = sorted((five.parent / "cache").glob("*.npy"))
    assert kept
    request = make_request(tmp_path / "run", five, None, transfer__strategy="hog_logistic")
    traditional.run(request)
    assert sorted((five.parent / "cache").glob("*.npy")) == kept
    monkeypatch.setattr(traditional, "fit_classifier", None)
    traditional.run(request)
    assert any("is finished" in line for line in request.console.lines)


def test_a_report_is_written_and_compared_with_a_network(by_hog, five, tmp_path):
    from experiments import compare, traditional

    request = make_request(tmp_path / "whole", five, None, transfer__strategy="pixels_svm")
    traditional.run(type(request)(request.config, request.folder, request.command, Notes()))
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "SVM (RBF kernel) on raw pixels: C=" in page and "is not kept" in page
    assert (tmp_path / "whole" / "figures" / "confusion.png").is_file()
    network = run(tmp_path / "network", five, "none")
    folders = [str(by_hog), str(network), str(tmp_path / "whole")]
    compare.main([*folders, "--out", str(tmp_path / "compared.html"), "--resamples", "100"])
    assert "SVM" in page and (tmp_path / "compared.html").is_file()


def test_there_is_no_model_to_evaluate_or_predict_with(launch, by_hog, five, tmp_path, capfd):
    study = f"--config={ROOT / 'configs' / 'default.py'}"
    for experiment in ("evaluate", "predict"):
        keys = {"experiment": experiment, "eval.run": by_hog, "data.name": "npz", "data.dir": five}
        flags = [f"--config.{key}={value}" for key, value in keys.items()]
        out = tmp_path / experiment
        assert launch.run_command(["launch.py", study, *flags, f"--workdir={out}"]) == 2
        message = capfd.readouterr().err
        assert "a traditional run keeps no model" in message and message.count("\n") == 1
        assert not out.exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"task": "ordinal"}, r"one label an image \(classify\), not ordinal"),
        ({"task": "segment"}, r"one label an image \(classify\), not segment"),
        ({"transfer__pretrain_loss": "l2sp"}, "experiment=traditional has no network"),
        ({"model__contrast": "clahe"}, "model.contrast=clahe is for a network"),
        ({"traditional__features": "sift"}, "traditional.features='sift' is not known"),
        ({"traditional__classifier": "knn"}, "choose from logistic, svm, forest"),
        ({"transfer__strategy": "full"}, "experiment=traditional has none"),
        ({"model__weights": "imagenet"}, "model.weights='imagenet' has no effect"),
        ({"eval__tta": 3}, "eval.tta=3 is for experiment=finetune"),
    ],
)
def test_what_has_no_meaning_is_one_line(five, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", five, None, experiment="traditional", **keys)
    assert not (tmp_path / "run").exists()


def test_rows_of_a_ladder_and_of_an_ablation(launch, no_pictures, five, tmp_path, capsys):
    usual = {
        "model.name": "lenet5",
        "model.weights": "none",
        "model.image_size": 28,
        "data.name": "npz",
        "data.dir": five,
        "data.batch_size": 16,
        "train.min_steps": 0,
        "train.devices": 1,
        "eval.resamples": 20,
        "transfer.cache_dir": tmp_path / "cache",
    }
    ladder = {
        "experiment": "ladder",
        "ladder.strategies": "scratch,hog_svm,pixels_logistic",
        "ladder.fractions": "0.5,1",
        "ladder.seeds": 1,
        "ladder.reference": "scratch",
    }
    rows = {"method": {name: {"transfer.strategy": name} for name in ("scratch", "lbp_logistic")}}
    ablation = {"experiment": "ablation", "ablation.axes": json.dumps(rows), "ablation.seeds": 1}
    study = f"--config={ROOT / 'configs' / 'default.py'}"
    for name, keys in (("ladder", ladder), ("ablation", ablation)):
        flags = [f"--config.{key}={value}" for key, value in {**usual, **keys}.items()]
        folder = tmp_path / name
        command = ["launch.py", study, *flags, f"--workdir={folder}"]
        assert launch.run_command(command) == 0, capsys.readouterr().err
        table = (folder / f"{name}.md").read_text()
        assert ("hog_svm" if name == "ladder" else "lbp_logistic") in table
        cells = list((folder / "cells").iterdir())
        assert len(cells) == (6 if name == "ladder" else 2)
    shutil.rmtree(tmp_path / "ladder" / "cells" / "hog_svm-50-0")
    (tmp_path / "ladder" / runs.METRICS).unlink()
    flags = [f"--config.{key}={value}" for key, value in {**usual, **ladder}.items()]
    before = (tmp_path / "ladder" / "ladder.md").read_text()
    command = ["launch.py", study, *flags, f"--workdir={tmp_path / 'ladder'}"]
    assert launch.run_command(command) == 0
    again = (tmp_path / "ladder" / "ladder.md").read_text()
    assert again.count("\n") == before.count("\n")
