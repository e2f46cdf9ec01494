"""Strategies and what a config makes of the parts of a training, without training."""

import dataclasses

import jax
import numpy as np
import pytest
from digit_runs import make_request

from medtl_jax import runs
from medtl_jax.errors import UserError
from medtl_jax.models import registry
from medtl_jax.objectives.task import Task
from medtl_jax.weights.files import read_weights
from medtl_jax.weights.pretrained import save_weights

MODELS = {"lenet5": 28, "resnet18": 32, "efficientnet_lite0": 32, "googlenet": 224}
FIVE = tuple("01234")


pytestmark = pytest.mark.usefixtures("small_runs")


def settings(name, model, **more):
    auxiliary = 0.3 if model == "googlenet" else 0.0
    usual = {"model__name": model, "model__image_size": MODELS[model], "model__dropout": 0.0}
    return {"transfer__strategy": name, "model__auxiliary": auxiliary, **usual, **more}


def strategies():
    from experiments.strategies import STRATEGIES

    return {
        name: strategy
        for name, strategy in STRATEGIES.items()
        if strategy.settings.get("experiment") != "traditional"
    }


def new_parts(config):
    from experiments import study

    return study.new_parts(config)


# ---- strategies --------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_every_strategy_is_a_config_of_every_network(five, tmp_path, model):
    from experiments.options import group_table
    from medtl_jax.objectives.pretrain import needs
    from medtl_jax.transfer.phases import parse_phases

    tables = {}
    for name, strategy in strategies().items():
        # The features are kept for classifiers at the end alone.
        more = {"model__auxiliary": 0.0} if "transfer.cache" in strategy.settings else {}
        weights = None if name == "scratch" else "a file"
        config = make_request(tmp_path, five, weights, **settings(name, model, **more)).config
        tables[name] = group_table(config)
        assert config["experiment"] == ("extract" if name in ("knn", "probe") else "finetune")
        assert config["model"]["weights"] == ("none" if name == "scratch" else "a file")
        assert bool(needs(config["transfer"]["pretrain_loss"])) == (
            name in ("l2sp", "delta", "lwf", "replay", "cotuning")
        )
        phases = parse_phases(config["transfer"]["phases"], tables[name])
        assert len(phases) == (3 if name == "gradual" else 1)
        if name == "gradual":
            new = set(new_parts(config))
            trained = [{s for s, g in phase.table.items() if g != "frozen"} for phase in phases]
            assert trained[0] == new < trained[1] < trained[2] == set(tables[name])

    _, spec = registry.create_model(model, 1)
    heads = {"head": "high"} | ({"aux1": "high", "aux2": "high"} if model == "googlenet" else {})
    assert tables["full"] == {**dict.fromkeys(spec.stages, "low"), **heads}
    for name in ("lpft", "decay", "gradual", "l2sp", "delta", "lwf", "replay", "cotuning", "bss"):
        assert tables[name] == tables["full"], name
    assert set(tables["scratch"].values()) == {"high"}
    assert tables["head"] == {**dict.fromkeys(spec.stages, "frozen"), "head": "high"}
    assert {tables["groups"]["stem"], tables["groups"]["head"]} == {"frozen", "high"}
    assert set(tables["groups"].values()) == {"frozen", "low", "high"}


def test_a_given_key_that_the_strategy_sets_otherwise_is_refused(five, tmp_path):
    with pytest.raises(UserError) as refused:
        make_request(
            tmp_path, five, "a file", **settings("l2sp", "lenet5", transfer__pretrain_loss="lwf")
        )
    assert str(refused.value) == (
        "transfer.pretrain_loss='lwf' has no effect: transfer.strategy=l2sp sets it to 'l2sp'; "
        "leave one of the two out"
    )
    with pytest.raises(UserError, match=r"transfer.alpha=0.5 has no effect.* sets it to 0.01"):
        make_request(tmp_path, five, "a file", **settings("l2sp", "lenet5", transfer__alpha=0.5))
    with pytest.raises(UserError, match=r"model.weights='a file' has no effect.* to 'none'"):
        make_request(tmp_path, five, "a file", **settings("scratch", "lenet5"))
    with pytest.raises(UserError, match=r"leave one of the two out, or name lwf@0.5$"):
        make_request(tmp_path, five, "a file", **settings("lwf@2", "lenet5", transfer__alpha=0.5))
    # The same value is no conflict, and other keys are free.
    found = make_request(
        tmp_path, five, None, **settings("l2sp", "lenet5", transfer__alpha=0.01, seed=4)
    )
    assert found.config["transfer"]["alpha"] == 0.01 and found.config["seed"] == 4


def test_a_strategy_may_have_another_alpha(five, tmp_path):
    from experiments.strategies import find_strategy

    usual = make_request(tmp_path, five, "a file", **settings("delta", "lenet5")).config
    found = make_request(tmp_path, five, "a file", **settings("delta@0.25", "lenet5")).config
    assert (usual["transfer"]["alpha"], found["transfer"]["alpha"]) == (1.0, 0.25)
    same = {"alpha": 1.0, "strategy": "delta"}
    assert {**found, "transfer": {**found["transfer"], **same}} == usual
    assert find_strategy("delta@0.25").summary == f"{find_strategy('delta').summary}; alpha 0.25"
    for text in ("full@1", "delta@", "delta@x", "delta@-1", "delta@inf", "@1", "delta@1@2"):
        with pytest.raises(UserError, match=f"transfer.strategy='{text}'"):
            find_strategy(text)


def test_an_unknown_strategy_is_one_line(five, tmp_path):
    with pytest.raises(UserError, match=r"transfer.strategy='lsp' is not known; choose from scr"):
        make_request(tmp_path, five, "a file", **settings("lsp", "lenet5"))


# ---- parts -------------------------------------------------------------------------------------


def random_weights(path, name, size, channels=1):
    """A file of drawn values, statistics too, of a network for five classes."""
    model, spec = registry.create_model(name, 5, in_chans=channels)
    rng = np.random.default_rng(0)

    def draw(place, leaf):
        values = 0.1 * rng.standard_normal(leaf.shape, np.float32)
        return 1 + np.abs(values) if place[-1].key in ("var", "scale") else values

    variables = jax.tree_util.tree_map_with_path(draw, registry.variable_shapes(model, size))
    fields = {"mean": (127.5,) * channels, "std": (127.5,) * channels}
    spec = dataclasses.replace(spec, input=dataclasses.replace(spec.input, **fields, offset=False))
    save_weights(path, variables, spec, Task("classify", FIVE))
    return path


@pytest.fixture(scope="module")
def lenet(tmp_path_factory):
    return random_weights(tmp_path_factory.mktemp("weights") / "lenet.safetensors", "lenet5", 28)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "baseline.safetensors"
    return random_weights(path, "baseline_cnn", 28)


def prepared(folder, data, weights, **more):
    from experiments.prepared import prepare

    return prepare(make_request(folder, data, weights, **more))


PLAIN = {
    "optim__name": "sgd",
    "optim__momentum": 0.0,
    **{f"optim__{group}__weight_decay": 0.0 for group in ("low", "high")},
    **{f"optim__{group}__clip": 0.0 for group in ("low", "high")},
}


def test_phases_share_the_epochs_and_go_on_in_one_schedule(five, lenet, tmp_path):
    made = prepared(
        tmp_path,
        five,
        lenet,
        transfer__strategy="gradual",
        train__epochs=8,
        optim__warmup_epochs=2.0,
        **PLAIN,
    )
    training, steps = made.training, made.environment["training"]["steps_per_epoch"]
    assert steps == 6
    assert [phase.first for phase in training.phases] == [0, 2, 4]
    tables = [phase.parts.table for phase in training.phases]
    assert [[s for s, g in table.items() if g != "frozen"] for table in tables] == [
        ["head"],
        ["stage1", "features", "head"],
        ["stem", "stage1", "features", "head"],
    ]
    params = made.state.params
    ones = jax.tree.map(jax.numpy.ones_like, params)
    for phase in training.phases:
        optimizer, first = phase.parts.optimizer, phase.first * steps
        state = optimizer.init(params)
        for step in (first, first + 1):
            updates, state = optimizer.update(ones, state, params)
            for stage, group in phase.parts.table.items():
                # Peaks of 5e-4 and 2e-3; up in 12 steps, then half a cosine down to the 48th.
                peak = {"frozen": 0.0, "low": 5e-4, "high": 2e-3}[group]
                up = (1 / 12) + (11 / 12) * step / 12
                down = 0.5 * (1 + np.cos(np.pi * (step - 12) / 36))
                rate = peak * (up if step < 12 else down)
                for leaf in jax.tree.leaves(updates[stage]):
                    np.testing.assert_allclose(leaf, -rate, rtol=1e-5, atol=1e-12)


def test_the_source_head_learns_where_a_loss_reads_it_alone(five, lenet, tmp_path):
    source = {"transfer__source__name": "npz", "transfer__source__dir": str(five)}
    full = {
        "transfer__groups__low": "stem,stage1,features",
        "transfer__groups__high": "head",
    }
    cases = [
        ({"transfer__strategy": "lwf"}, "low", True, True),
        ({"transfer__strategy": "l2sp"}, None, True, False),
        ({"transfer__strategy": "l2sp", **source}, "frozen", True, False),
        ({**full, **source}, "frozen", False, False),
        (
            {**full, **source, "transfer__pretrain_loss": "replay", "transfer__alpha": 1.0},
            "low",
            True,
            False,
        ),
    ]
    for more, group, anchored, teacher in cases:
        made = prepared(tmp_path, five, lenet, **more)
        parts, state = made.parts, made.state
        assert parts.table.get("source_head") == group
        assert ("source_head" in state.params) == (group is not None)
        assert (state.anchor is not None) == anchored and parts.teacher == teacher
        assert ("source" in made.training.feed.sets) == ("replay" in str(more))
        assert (made.source is not None) == ("transfer__source__name" in more)
        if group:
            there = read_weights(lenet).tensors
            for name in ("kernel", "bias"):
                np.testing.assert_array_equal(
                    state.params["source_head"][name], there[f"params/head/{name}"]
                )
            head = state.params["head"]["kernel"]
            assert not np.array_equal(head, there["params/head/kernel"])


BASELINE = {
    "model__name": "baseline_cnn",
    "transfer__groups__low": "stem,stage.",
    "transfer__groups__high": "head",
}


def test_an_average_of_weights_is_evaluated_with_exact_statistics(five, baseline, tmp_path):
    made = prepared(tmp_path, five, baseline, train__swa=0.5, train__ema=0.0, **BASELINE)
    average = made.parts.average
    assert (average.ema, average.swa_start) == (0.0, 6)
    mean = jax.tree.map(lambda leaf: 2 * leaf, made.state.ema["params"])
    state = made.state.replace(ema={**made.state.ema, "params": mean})
    found = made.training.evaluated(state)
    jax.tree.map(np.testing.assert_array_equal, found["params"], mean)
    # All 96 training images, which six batches of 16 hold: the first norm's statistics by hand.
    images = np.load(five)["train_images"][..., None].astype(np.float32)
    kernel = mean["stem"]["conv1"]["conv"]["kernel"]
    x = jax.lax.conv_general_dilated(
        (images - 127.5) / 127.5, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    norm = found["batch_stats"]["stem"]["conv1"]["norm"]
    np.testing.assert_allclose(norm["mean"], x.mean((0, 1, 2)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(norm["var"], x.var((0, 1, 2)), rtol=1e-3, atol=1e-4)
    # Without either the state is evaluated as it is.
    plain = prepared(tmp_path, five, baseline, train__ema=0.0, **BASELINE)
    found = plain.training.evaluated(plain.state)
    jax.tree.map(np.testing.assert_array_equal, found["params"], plain.state.params)
    jax.tree.map(np.testing.assert_array_equal, found["batch_stats"], plain.state.batch_stats)


@pytest.mark.parametrize("policy", ["stats", "freeze"])
def test_what_a_step_leaves_of_the_norms_under_a_policy(five, baseline, tmp_path, policy):
    from medtl_jax.training.step import take, train_step

    made = prepared(tmp_path, five, baseline, transfer__bn__low=policy, **BASELINE)
    rows = made.training.feed.indices(0, 0, 1, 16)
    batch = take(made.training.feed.sets, {name: array[0] for name, array in rows.items()})
    before = jax.tree.map(np.array, made.state)
    state, _ = jax.jit(lambda s, b, k: train_step(s, b, k, parts=made.parts))(
        made.state, batch, jax.random.key(0)
    )
    for stage in ("stem", "stage1", "stage2", "stage3"):
        parts = [
            (before.batch_stats[stage], state.batch_stats[stage], False),
            *(
                (tree.params[stage]["conv1"]["norm"], after, policy != "freeze")
                for tree, after in [(before, state.params[stage]["conv1"]["norm"])]
            ),
            (
                before.params[stage]["conv1"]["conv"],
                state.params[stage]["conv1"]["conv"],
                True,
            ),
        ]
        for old, new, moves in parts:
            pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
            same = [np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs]
            assert not any(same) if moves else all(same), (stage, policy)


def test_every_key_of_a_strategy_is_one_of_the_config():
    from configs import default

    keys = runs.flat_config(default.get_config().to_dict()).keys()
    for name, strategy in strategies().items():
        assert strategy.settings.keys() <= keys, name
        assert strategy.summary
