"""Trainings with L_pre: what it holds, what it leaves alone, what is forgotten of the source."""

import shutil

import jax
import numpy as np
import pytest
from digit_runs import (
    Notes,
    best,
    history,
    initial,
    make_request,
    run,
    scores,
    stopped_at,
    tensors,
    write_digits,
)

from medtl_jax import runs
from medtl_jax.errors import UserError

STAGES = ("stem", "stage1", "features")
FULL = {
    "transfer__groups__low": "stem,stage1,features",
    "transfer__groups__high": "head",
    "train__epochs": 1,
}


pytestmark = pytest.mark.usefixtures("small_runs")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("three") / "digits.npz", 3, seed=2)


@pytest.fixture(scope="module")
def first(five, tmp_path_factory):
    """A LeNet that tells five digits apart."""
    folder = tmp_path_factory.mktemp("first") / "run"
    return run(folder, five, "none", train__epochs=6, train__ema=0.0, optim__high__lr=5e-3)


@pytest.fixture(scope="module")
def tune(first, five, three, tmp_path_factory):
    """`tune(loss, alpha, **settings) -> folder` of a training on three digits from `first` on."""

    def call(loss="none", alpha=0.0, **settings):
        folder = tmp_path_factory.mktemp("tuned") / "run"
        source = {"transfer__source__name": "npz", "transfer__source__dir": str(five)}
        keys = {**FULL, "transfer__pretrain_loss": loss, "transfer__alpha": alpha}
        return run(folder, three, first, **{**keys, **source, **settings})

    return call


def moved(folder):
    """How far the stages have gone from where they began."""
    before, after = initial(folder), tensors(folder)
    parts = [(after[name] - before[name]).ravel() for name in after if name.split("/")[1] in STAGES]
    return float(np.linalg.norm(np.concatenate(parts)))


def kept(folder):
    """Accuracy of the source's classifier on the source's test split before and after."""
    source = runs.read_json(folder / runs.DRIFT)["source"]
    assert source["metric"] == "accuracy"
    return source["before"]["value"], source["after"]["value"]


# Plain steps, so that a gradient's size counts.
SGD = {"optim__low__lr": 1e-2, "optim__low__weight_decay": 0.0, "optim__name": "sgd"}


@pytest.fixture(scope="module")
def plain(tune):
    return tune(**SGD)


def test_what_is_kept_of_the_source_is_measured_and_replay_keeps_more(first, tune):
    fast = {"optim__low__lr": 3e-3, "train__epochs": 5, "train__ema": 0.0}
    before, after = kept(tune(**fast))
    metrics = runs.read_json(first / runs.METRICS)
    assert before == metrics["test"]["accuracy"]["value"] > 0.6
    assert after < kept(tune("replay", 1.0, **fast))[1]
    assert after < before


@pytest.mark.parametrize("loss", ["l2sp", "delta", "lwf"])
def test_the_stages_move_the_less_the_more_they_are_held(tune, plain, loss):
    held = tune(loss, 1e3, **SGD)
    assert moved(held) < 0.8 * moved(plain)
    assert "loss_pre" in history(held)[0] and "loss_pre" not in history(plain)[0]
    # Another run begins with a file that has the new classifier alone.
    assert not any("source_head" in name for name in tensors(held))


@pytest.mark.parametrize(("loss", "alpha"), [("replay", 0.5), ("cotuning", 0.5), ("bss", 1e-3)])
def test_the_other_losses_train_and_log(tune, first, loss, alpha):
    folder = tune(loss, alpha, **SGD)
    record = history(folder)[0]
    wanted = record["loss_new"] + alpha * record["loss_pre"]
    assert record["loss_pre"] > 0 and record["train_loss"] == pytest.approx(wanted, rel=1e-4)
    before, after = initial(folder), best(folder, 1)
    for name in ("kernel", "bias"):
        found = before[f"params/source_head/{name}"]
        np.testing.assert_array_equal(found, tensors(first)[f"params/head/{name}"])
        # The weights' own classifier learns where a loss reads it.
        assert np.array_equal(after[f"params/source_head/{name}"], found) == (loss == "bss")


def test_alpha_has_no_part_in_the_first_update_of_the_head(first, three, tmp_path):
    """The whole batch is one: the only update sees the stages as they began."""
    from experiments.prepared import prepare
    from medtl_jax.training.step import take, train_step

    found = {}
    for alpha in (1e-3, 1e3):
        keys = {**FULL, "transfer__pretrain_loss": "lwf + l2sp", "transfer__alpha": alpha}
        made = prepare(make_request(tmp_path, three, first, **keys))
        feed, parts = made.training.feed, made.parts
        rows = feed.indices(0, 0, 1, 16)
        batch = take(feed.sets, {name: array[0] for name, array in rows.items()})
        step = jax.jit(lambda s, b, k, parts=parts: train_step(s, b, k, parts=parts))
        state, _ = step(made.state, batch, jax.random.key(0))
        found[alpha] = jax.tree.map(np.array, state.params)
    weak, strong = found.values()
    for name, leaf in weak["head"].items():
        np.testing.assert_array_equal(leaf, strong["head"][name])
    assert not np.array_equal(
        weak["features"]["fc1"]["kernel"], strong["features"]["fc1"]["kernel"]
    )


def test_a_resumed_run_holds_on_to_weights_that_are_gone(first, three, tmp_path):
    weights = shutil.copytree(first, tmp_path / "first")
    keys = {
        **FULL,
        "train__epochs": 2,
        "transfer__pretrain_loss": "lwf + 0.1*l2sp",
        "transfer__alpha": 1.0,
        "transfer__alpha_schedule": "cosine",
    }
    whole = run(tmp_path / "whole", three, weights, **keys)
    with stopped_at(2):
        run(tmp_path / "halved", three, weights, **keys)
    shutil.rmtree(weights)
    halved = run(tmp_path / "halved", three, weights, **keys)
    assert history(halved) == history(whole)
    for name in (runs.METRICS, runs.DRIFT, runs.WEIGHTS, "predictions.npz"):
        assert (halved / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_resumed_run_refuses_what_it_did_not_begin_with(first, five, three, tmp_path):
    source = shutil.copy(five, tmp_path / "source.npz")
    keys = {
        **FULL,
        "train__epochs": 2,
        "transfer__pretrain_loss": "replay",
        "transfer__alpha": 1.0,
        "transfer__source__name": "npz",
        "transfer__source__dir": str(source),
    }
    with stopped_at(2):
        run(tmp_path / "run", three, first, **keys)
    write_digits(source, 5, seed=7)
    with pytest.raises(UserError, match="begun with other source data"):
        run(tmp_path / "run", three, first, **keys)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "initial")
    with pytest.raises(UserError, match="initial is missing: delete its run folder"):
        run(tmp_path / "run", three, first, **keys)


def test_a_run_on_four_devices_is_evaluated_on_one(first, five, three, tmp_path):
    """Its source is measured too: what checkpoints hold lies on no device in particular."""
    source = {"transfer__source__name": "npz", "transfer__source__dir": str(five)}
    keys = {**FULL, **source, "eval__batch_size": 12}
    one = run(tmp_path / "one", three, first, **keys)
    four = run(tmp_path / "four", three, first, train__devices=4, **keys)
    np.testing.assert_allclose(scores(four), scores(one), atol=1e-3)
    assert kept(four)[0] == kept(one)[0]
    for trained, devices in ((four, 1), (one, 4)):
        config = make_request(tmp_path, three, first, **keys).config
        config = {
            **config,
            "experiment": "evaluate",
            "train": {**config["train"], "devices": devices},
            "eval": {**config["eval"], "run": str(trained)},
        }
        folder = tmp_path / f"scored-{trained.name}"
        evaluate_with(config, folder)
        wanted = runs.read_json(trained / runs.METRICS)["test"]["accuracy"]
        assert runs.read_json(folder / runs.METRICS)["test"]["accuracy"] == wanted


def evaluate_with(config, folder):
    from experiments import evaluate
    from experiments.study import Request

    evaluate.run(Request(evaluate.resolve(config), folder, "evaluate", Notes(), brief=True))


def test_the_source_is_divided_as_for_the_run_that_made_the_weights(first, five):
    from experiments.trained import division_of_source

    source = {"transfer__source__name": "npz", "transfer__source__dir": str(five)}
    config = make_request(first, five, first, data__seed_split=5, data__val_fraction=0.4, **source)
    divided = division_of_source(config.config)
    assert (divided["seed_split"], divided["val_fraction"]) == (0, 0.15)
    other = {**source, "transfer__source__dir": str(five.parent / "other.npz")}
    assert division_of_source(make_request(first, five, first, **other).config) == {}


@pytest.mark.slow
def test_gradual_unfreezing_is_resumed_within_its_second_phase(first, three, tmp_path):
    keys = {**FULL, "train__epochs": 4, "transfer__phases": "1: head; 2: features,head; 1: .*"}
    whole = run(tmp_path / "whole", three, first, **keys)
    assert [record["phase"] for record in history(whole)] == [1, 2, 2, 3]
    with stopped_at(3):
        run(tmp_path / "halved", three, first, **keys)
    halved = run(tmp_path / "halved", three, first, **keys)
    assert history(halved) == history(whole)
    np.testing.assert_array_equal(scores(halved), scores(whole))
