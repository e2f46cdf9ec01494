"""Runs that are adapted to unlabelled digits: what the target changes, and what it may not."""

import csv
import dataclasses
import functools
import json

import numpy as np
import pytest
from adapted_runs import DANN, SMALL, adapted, other_digits, write_target
from digit_runs import (
    best,
    checkpoint,
    digits,
    history,
    initial,
    make_request,
    run,
    scores,
    stopped_at,
    tensors,
)
from PIL import Image

from medtl_jax import runs
from medtl_jax.domain.adversary import DISCRIMINATOR
from medtl_jax.errors import UserError
from medtl_jax.models.norms import domain_key

pytestmark = pytest.mark.usefixtures("small_runs")

# A run with all that must be kept for it to go on: both statistics, a discriminator, an average.
FULL = {**DANN, "domain__bn": "own", "domain__affine": True, "train__ema": 0.5}
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
OWN = f"/{domain_key(1)}/"


def metrics(folder):
    return json.loads((folder / runs.METRICS).read_text())


def without_oracle(records):
    return [{k: v for k, v in record.items() if "oracle" not in k} for record in records]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target") / "target.npz")


@pytest.fixture(scope="module")
def plain(five, tmp_path_factory):
    """A run without a target."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    return run(folder, five, None, model__name="lenet5_bn", model__weights="none")


@pytest.fixture(scope="module")
def whole(five, target, tmp_path_factory):
    """An adapted run that was not interrupted."""
    return adapted(tmp_path_factory.mktemp("whole") / "run", five, target, **FULL)


def assert_equal(found, wanted):
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# ---- the source-only run -----------------------------------------------------------------------


@pytest.mark.parametrize("bn", [SLOW("source"), "own"])
def test_at_strength_0_it_is_the_source_only_run_to_the_bit(bn, plain, five, target, tmp_path):
    settings = {**DANN, "domain__strength": 0.0, "domain__select": "source", "domain__bn": bn}
    folder = adapted(tmp_path / "run", five, target, **settings)
    kept = {key: value for key, value in history(plain)[-1].items() if key.startswith("val_")}
    assert kept.items() <= history(folder)[-1].items()
    epoch = min(history(plain), key=lambda record: record["val_loss"])["epoch"]
    found = best(folder, epoch)
    assert_equal(found, tensors(plain))
    # The target's statistics are others, and are there where they were asked for alone.
    own = [name for name in found if OWN in name]
    assert bool(own) == (bn == "own")
    for name in own:
        assert not np.array_equal(found[name], found[name.replace(OWN, "/")]), name
    with np.load(plain / "predictions.npz") as a, np.load(folder / "predictions.npz") as b:
        np.testing.assert_array_equal(a["test_score"], b["source_test_score"])


def test_a_plain_run_knows_nothing_of_a_discriminator(plain, whole):
    assert not [key for record in history(plain) for key in record if "discriminator" in key]
    for record in history(whole):
        assert 0 <= record["discriminator_accuracy"] <= 1 and record["lr_discriminator"] > 0
        assert record["loss_domain"] > 0


# ---- labels of the target ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["permuted", SLOW("removed")])
def test_labels_of_the_target_train_and_choose_nothing(kind, whole, five, tmp_path):
    labels = digits(48, 5, 70)[1]
    changed = {"permuted": (labels + 1) % 5, "removed": None}[kind]
    target = write_target(tmp_path / "target.npz", train_labels=changed)
    folder = adapted(tmp_path / "run", five, target, **FULL)
    assert without_oracle(history(folder)) == without_oracle(history(whole))
    assert_equal(tensors(folder), tensors(whole))
    np.testing.assert_array_equal(scores(folder), scores(whole))
    oracle, other = (
        [{k: v for k, v in record.items() if "oracle" in k} for record in history(one)]
        for one in (whole, folder)
    )
    assert set(oracle[0]) == {"oracle_accuracy", *(f"oracle_{name}" for name in ORACLES)}
    assert oracle != other and bool(other[0]) == (kind == "permuted")


ORACLES = ("auc", "balanced_accuracy", "f1", "mcc", "pr_auc")


@pytest.mark.slow
def test_labels_of_the_test_split_only_score(whole, five, tmp_path):
    target = write_target(tmp_path / "target.npz", test_labels=None)
    folder = adapted(tmp_path / "run", five, target, **FULL)
    assert history(folder) == history(whole)
    assert_equal(tensors(folder), tensors(whole))
    assert list(metrics(folder)) == ["val", "source_test"]
    card = json.loads((folder / runs.ENVIRONMENT).read_text())["target"]
    assert card["labelled"] == ["train"] and card["images"] == {"train": 48, "test": 30}
    with np.load(folder / "predictions.npz") as found:
        assert not [name for name in found if name.startswith("test_")]


def test_one_image_without_labels_is_a_target(five, tmp_path):
    """Of 96 times fewer images than the source, and of no test."""
    from experiments import finetune

    bare = {f"{split}_{kind}": None for split in ("val", "test") for kind in ("images", "labels")}
    target = write_target(tmp_path / "target.npz", train=1, train_labels=None, **bare)
    settings = {"domain__method": "mmd + 0.1*mcc", "domain__target__dir": target}
    settings |= {"domain__gamma": 5.0, "domain__width": 8, "train__epochs": 1}
    keys = {"model__weights": "none", **SMALL, **settings}
    request = make_request(tmp_path / "run", five, None, **keys)
    finetune.run(request)
    assert list(metrics(request.folder)) == ["val", "source_test"]
    assert {
        "note: the target has no split test",
        "note: the target has no labels in train",
        "note: an epoch passes once over 96 source images and 96 times over 1 target images",
        "note: domain.width=8 has no effect: it needs one of dann, cdan, cdan_e in domain.method",
    } <= set(request.console.lines)
    (record,) = history(request.folder)
    assert record["loss_domain"] > 0 and not any("oracle" in key for key in record)


# ---- going on, and other devices ---------------------------------------------------------------


def test_an_interrupted_run_goes_on_to_the_same_end(whole, five, target, tmp_path):
    with stopped_at(2):
        adapted(tmp_path / "run", five, target, **FULL)
    assert len(history(tmp_path / "run")) == 2
    folder = adapted(tmp_path / "run", five, target, **FULL)
    assert history(folder) == history(whole)
    for kind in ("last", "best"):
        epoch = 2 if kind == "last" else chosen(whole)
        assert_equal(checkpoint(folder, kind, epoch), checkpoint(whole, kind, epoch))
    assert any(DISCRIMINATOR in name for name in checkpoint(whole, "last", 2))
    np.testing.assert_array_equal(scores(folder), scores(whole))


def chosen(folder):
    values = [record["target_infomax"] for record in history(folder)]
    return 1 + int(np.argmax(values))


@pytest.mark.slow
def test_four_devices_give_the_run_of_one(whole, five, target, tmp_path):
    folder = adapted(tmp_path / "run", five, target, **FULL, train__devices=4)
    for one, four in zip(history(whole), history(folder), strict=True):
        for key in ("train_loss", "loss_domain", "val_loss", "target_infomax"):
            # Mutual information is a small difference of two entropies, of about 1.6 nats each.
            assert four[key] == pytest.approx(one[key], rel=2e-3, abs=1e-6), key
    for name, array in tensors(whole).items():
        # A bias before a norm has no gradient but rounding, which AdamW makes steps of; the norm's
        # mean follows it, and takes its effect away.
        loose = name.endswith(("/conv/bias", "/norm/mean"))
        np.testing.assert_allclose(tensors(folder)[name], array, atol=5e-3 if loose else 1e-5)


# ---- what is left of a run ---------------------------------------------------------------------


def of_run(request, experiment, **settings):
    """The request of another experiment on the same config, with some keys set."""
    given = {key.replace("__", "."): value for key, value in settings.items()}
    flat = {**runs.flat_config(request.config), **given}
    config = runs.nested_config(request.config, flat)
    config = experiment.resolve({**config, "experiment": experiment.__name__}, given.keys())
    return dataclasses.replace(request, config=config)


def test_evaluate_and_predict_use_the_statistics_of_the_target(whole, five, target, tmp_path):
    from experiments import evaluate, predict

    request = make_request(tmp_path / "evaluate", five, None, model__weights="none")
    keys = {"eval__run": str(whole), "data__dir": target, "eval__splits": "test"}
    evaluate.run(of_run(request, evaluate, **keys))
    np.testing.assert_array_equal(scores(tmp_path / "evaluate"), scores(whole))
    found, wanted = metrics(tmp_path / "evaluate")["test"], metrics(whole)["test"]
    assert found["accuracy"] == wanted["accuracy"] and found["auc"] == wanted["auc"]
    (tmp_path / "images").mkdir()
    for i, image in enumerate(other_digits(30, 72)[0]):
        Image.fromarray(image).save(tmp_path / "images" / f"{i:02d}.png")
    request = dataclasses.replace(request, folder=tmp_path / "predict")
    keys = {"eval__run": str(whole), "data__dir": str(tmp_path / "images")}
    predict.run(of_run(request, predict, **keys))
    with (tmp_path / "predict" / predict.TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    for k in range(5):
        column = [float(row[str(k)]) for row in rows]
        np.testing.assert_allclose(column, scores(whole)[:, k], atol=1e-6)


def test_the_weights_load_into_a_plain_network_and_frozen_stages_stay(
    whole, five, target, tmp_path
):
    """In a run that is adapted again, with an L_pre on the stages that train."""
    assert not [name for name in tensors(whole) if OWN in name or DISCRIMINATOR in name]
    settings = {
        **FULL,
        "model__weights": str(whole),
        "model__keep_head": True,
        "transfer__groups__frozen": "stem",
        "transfer__groups__low": "stage1,features",
        "transfer__groups__high": "head",
        "transfer__pretrain_loss": "l2sp",
        "transfer__alpha": 0.1,
        "augment__mixup": 0.4,
        "train__epochs": 1,
    }
    folder = adapted(tmp_path / "run", five, target, **settings)
    assert_equal(initial(folder), tensors(whole))
    found = best(folder, 1)
    frozen = [name for name in found if "/stem/" in name]
    assert any(OWN in name for name in frozen)
    for name, array in found.items():
        before = initial(folder)[name.replace(OWN, "/")]
        assert np.array_equal(array, before) == (name in frozen), name


def test_the_runs_own_data_meet_the_statistics_of_the_source(whole, five, tmp_path, monkeypatch):
    from experiments import evaluate, reporting

    told, finish = [], reporting.finish

    def remember(*content):
        told.append((content[6], content[7]))
        finish(*content)

    monkeypatch.setattr(reporting, "finish", remember)
    request = make_request(tmp_path / "evaluate", five, None, model__weights="none")
    keys = {"eval__run": str(whole), "eval__splits": "val,test"}
    evaluate.run(of_run(request, evaluate, **keys))
    with np.load(whole / "predictions.npz") as a, np.load(request.folder / "predictions.npz") as b:
        np.testing.assert_array_equal(b["val_score"], a["val_score"])
        np.testing.assert_array_equal(b["test_score"], a["source_test_score"])
    found, wanted = metrics(request.folder), metrics(whole)
    # Those after scaling by the temperature are among them.
    assert found == {"val": wanted["val"], "test": wanted["source_test"]}
    assert "nll_calibrated" in found["test"]
    ((notes, fitted_on),) = told
    assert fitted_on == "val"
    assert notes[1:] == ["Batch statistics: those of the source, as these images are of its set."]


def test_the_other_scanner_of_a_phantom_is_not_the_source(tmp_path, monkeypatch):
    from experiments import trained

    def of_source(scanner, **domain):
        config = make_request(tmp_path, tmp_path / "x.npz", None, model__weights="none").config
        data = {**config["data"], "name": "phantom", "dir": ""}
        earlier = {**config, "data": data, "domain": {**config["domain"], **domain}}
        data = {**data, "phantom": {**data["phantom"], "domain": scanner}}
        monkeypatch.setattr(trained, "_run_config", lambda folder: earlier)
        monkeypatch.setattr(trained, "is_own_data", lambda config: True)
        eval_ = {**config["eval"], "run": str(tmp_path)}
        return trained.is_of_source({**config, "data": data, "eval": eval_})

    phantom = {"target": {"name": "phantom", "dir": ""}}
    assert of_source("a", **phantom) and not of_source("b", **phantom)
    # Nothing else was adapted to it.
    assert of_source("b") and of_source("b", target={"name": "npz", "dir": "y.npz"})


@pytest.fixture(scope="module")
def table(five, target, tmp_path_factory):
    """Both domains as rows of one csv, told apart by the column `scanner`."""
    root = tmp_path_factory.mktemp("table")
    lines = ["path,split,label,scanner"]
    for scanner, path in (("old", five), ("new", target)):
        with np.load(path) as arrays:
            for split in ("train", "val", "test"):
                pairs = zip(arrays[f"{split}_images"], arrays[f"{split}_labels"], strict=True)
                for i, (image, label) in enumerate(pairs):
                    name = f"{scanner}{split}{i:03d}.png"
                    Image.fromarray(image).save(root / name)
                    lines.append(f"{name},{split},{label},{scanner}")
    (root / "labels.csv").write_text("\n".join(lines))
    return root / "labels.csv"


def test_rows_of_one_table_are_adapted_as_two_sets(table, tmp_path):
    from experiments import evaluate

    rows = {"data__name": "csv", "data__csv_where": "scanner=old"}
    keys = {**DANN, "domain__target__name": "csv", "domain__target__csv_where": "scanner=new"}
    folder = adapted(tmp_path / "run", table, str(table), **rows, **keys)
    names = np.load(folder / "predictions.npz")["test_id"]
    assert len(names) == 30 and all(name.startswith("newtest") for name in names)
    data = json.loads((folder / "environment.json").read_text())
    assert "only rows with scanner=old" in data["data"]["notes"]
    for scanner, part in (("new", "test"), ("old", "source_test")):
        request = make_request(tmp_path / scanner, table, None, model__weights="none")
        own = {"eval__run": str(folder), "eval__splits": "test", "data__name": "csv"}
        own["data__csv_where"] = f"scanner={scanner}"
        evaluate.run(of_run(request, evaluate, **own))
        found, wanted = metrics(request.folder)["test"], metrics(folder)[part]
        assert found["accuracy"] == wanted["accuracy"] and found["auc"] == wanted["auc"]


def test_a_target_of_all_rows_has_the_sources_images(table, tmp_path):
    keys = {**DANN, "domain__target__name": "csv", "data__name": "csv"}
    with pytest.raises(UserError, match="all training images of the source"):
        adapted(tmp_path / "run", table, str(table), data__csv_where="scanner=old", **keys)
    assert not (tmp_path / "run").exists()


# ---- masks -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("reads", ["stage1", "logits"])
def test_masks_are_adapted_by_a_map_or_by_the_answers(reads, five, tmp_path):
    phantom = {f"data__phantom__{split}": 16 for split in ("train", "val", "test")}
    settings = {
        "task": "segment",
        "model__weights": "none",
        "model__name": "lenet5",
        "model__image_size": 32,
        "model__decoder": "4,4",
        "data__name": "phantom",
        "data__dir": "",
        "domain__target__name": "phantom",
        "domain__method": "dann",
        "domain__reads": reads,
        "train__epochs": 1,
    }
    folder = run(tmp_path / "run", five, None, **settings, **phantom)
    config = json.loads((folder / runs.CONFIG).read_text())
    # A LeNet has no batch norms, its decoder has.
    assert config["domain"]["bn"] == "own"
    (record,) = history(folder)
    assert {"oracle_dice", "discriminator_accuracy", "target_infomax"} <= record.keys()
    found = metrics(folder)
    assert list(found) == ["val", "source_test", "test"] and found["test"]["dice"]["n"] == 16
    with np.load(folder / "predictions.npz") as kept:
        assert not np.array_equal(kept["test_score"], kept["source_test_score"])
