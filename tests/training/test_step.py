"""The train step: frozen means frozen, averages and losses by hand, equal on any devices."""

import dataclasses
import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medtl_jax.augment.policy import make_augment
from medtl_jax.data.loader import training_indices
from medtl_jax.errors import UserError
from medtl_jax.keys import named_key
from medtl_jax.models import registry
from medtl_jax.models.inputs import normalize
from medtl_jax.models.mobile import EfficientNetLite, StageSpec
from medtl_jax.objectives.task import cross_entropy
from medtl_jax.training import step as step_module
from medtl_jax.training.devices import data_mesh
from medtl_jax.training.runner import Feed, Runner
from medtl_jax.training.step import StepParts, Term, create_state, eval_step, train_step
from medtl_jax.transfer.groups import assign_stages, label_tree
from medtl_jax.transfer.optim import make_optimizer

KEY = jax.random.key(7)
INDICES = training_indices(0, 0, 20, 48, 16)


def run(training, pictures, steps, *, devices=1, scan=False, seed=7):
    """The state after `steps` steps from the start, and the means that were logged."""
    mesh = data_mesh(devices)
    runner = Runner(training.parts, mesh, jax.random.key(seed), Feed({"train": pictures}), scan)
    state = jax.device_put(training.state(), mesh.replicated)
    return runner(state, {"train": INDICES[:steps]}, lambda done, total: None)


def stage_bytes(tree, stage):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree.get(stage, {}))]


def largest_difference(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


def test_frozen_means_frozen(make_training, pictures):
    training = make_training(ema=0.9)
    start = training.state()
    state, _ = run(training, pictures, 20)
    assert int(state.step) == 20
    moving = {"params": state.params, "batch_stats": state.batch_stats}
    for kind, stages in training.variables.items():
        before = getattr(start, kind)
        for stage in stages:
            first = stage_bytes(before, stage)
            for name, after in (("state", moving[kind]), ("ema", state.ema[kind])):
                same = [a == b for a, b in zip(first, stage_bytes(after, stage), strict=True)]
                frozen = training.parts.table[stage] == "frozen"
                assert all(same) if frozen else not any(same), (name, kind, stage)


def test_weight_decay_without_gradient_shrinks_trained_kernels_alone(make_training, pictures):
    optim = {"name": "sgd", "momentum": 0.0}
    optim |= {group: {"weight_decay": 0.5, "clip": 0.0} for group in ("low", "high")}
    training = make_training(optim=optim, rates={"low": 0.1, "high": 0.1})
    terms = (Term("new", 0.0, training.parts.terms[0].term),)
    training = dataclasses.replace(training, parts=dataclasses.replace(training.parts, terms=terms))
    state, _ = run(training, pictures, 1)
    params = training.variables["params"]
    np.testing.assert_allclose(
        state.params["head"]["kernel"], 0.95 * params["head"]["kernel"], rtol=1e-6
    )
    scale = state.params["features"]["norm"]["scale"]
    np.testing.assert_array_equal(scale, params["features"]["norm"]["scale"])
    np.testing.assert_array_equal(
        state.params["stem"]["conv"]["kernel"], params["stem"]["conv"]["kernel"]
    )


def test_loss_and_logs_of_a_step_by_hand(make_training, pictures):
    off = dict.fromkeys(("flip_horizontal", "shift"), 0.0)
    training = make_training(augment=off, dropout=0.0)
    batch = {name: jnp.asarray(array[:16]) for name, array in pictures.items()}
    variables = training.state()
    x = normalize(batch["image"], training.parts.spec.input)
    (logits, _), _ = training.parts.model.apply(
        {"params": variables.params, "batch_stats": variables.batch_stats},
        x,
        True,
        ("stem", "stage1"),
        mutable=["batch_stats"],
    )
    logits = np.asarray(logits, np.float64)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = 0.9 * np.eye(3)[pictures["target"][:16]] + 0.1 / 3
    wanted = -(target * log_probability).sum(-1).mean()
    step = jax.jit(functools.partial(train_step, parts=training.parts))
    _, logged = step(training.state(), batch, KEY)
    assert float(logged["count"]) == 16
    assert float(logged["loss"]) / 16 == pytest.approx(wanted, rel=1e-5)
    assert {name for name in logged if name.startswith("gradient")} == {
        "gradient_norm_low",
        "gradient_norm_high",
    }
    assert float(logged["gradient_norm_low"]) > 0


def test_a_term_counts_with_its_factor(make_training, pictures):
    training = make_training()
    term = training.parts.terms[0].term
    parts = dataclasses.replace(
        training.parts, terms=(Term("new", 0.25, term), Term("pre", 0.5, term))
    )
    batch = {name: jnp.asarray(array[:16]) for name, array in pictures.items()}
    once = jax.jit(functools.partial(train_step, parts=training.parts))
    twice = jax.jit(functools.partial(train_step, parts=parts))
    one = float(once(training.state(), batch, KEY)[1]["loss"])
    assert float(twice(training.state(), batch, KEY)[1]["loss"]) == pytest.approx(
        0.75 * one, rel=1e-5
    )


def test_moving_average_by_hand(make_training, pictures):
    training = make_training(ema=0.15)
    step = jax.jit(functools.partial(train_step, parts=training.parts))
    state = training.state()
    average = jax.tree.map(np.float64, {"params": state.params, "batch_stats": state.batch_stats})
    batch = {name: jnp.asarray(array[:16]) for name, array in pictures.items()}
    # min(decay, (1 + step) / (10 + step)): 1/10, then 2/11 and 3/12, both above 0.15.
    for decay in (0.1, 0.15, 0.15):
        state, _ = step(state, batch, KEY)
        new = {"params": state.params, "batch_stats": state.batch_stats}
        average = jax.tree.map(
            lambda old, value, d=decay: d * old + (1 - d) * np.float64(value), average, new
        )
    for found, wanted in zip(jax.tree.leaves(state.ema), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert largest_difference(state.ema["params"], state.params) > 1e-5
    assert step_module.evaluation_variables(state) is state.ema


def test_no_moving_average_evaluates_the_parameters(make_training):
    state = make_training().state()
    found = step_module.evaluation_variables(state)
    assert found["params"] is state.params and found["batch_stats"] is state.batch_stats


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_an_impossible_decay_is_refused(make_training, decay):
    with pytest.raises(UserError, match=r"train.ema=.* must lie in 0 <= decay < 1"):
        make_training(ema=decay)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(make_training, pictures):
    training = make_training()
    (a, logs), (b, _) = (run(training, pictures, 5) for _ in range(2))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    other, _ = run(training, pictures, 5, seed=8)
    assert largest_difference(a.params, other.params) > 1e-5
    assert np.isfinite(logs["loss"])


def test_training_learns(make_training, pictures):
    training = make_training()
    _, early = run(training, pictures, 5)
    _, all_steps = run(training, pictures, 20)
    assert all_steps["loss"] < 0.9 * early["loss"]


def smooth_optim():
    """Momentum SGD: Adam's g / |g| turns rounding in a gradient of nearly 0 into whole steps."""
    groups = {group: {"weight_decay": 0.01, "clip": 1.0} for group in ("low", "high")}
    return {"name": "sgd", "momentum": 0.9, **groups}


def test_a_scanned_epoch_equals_the_loop(make_training, pictures):
    training = make_training(optim=smooth_optim())
    looped, logs = run(training, pictures, 5)
    scanned, scan_logs = run(training, pictures, 5, scan=True)
    assert largest_difference(looped.params, scanned.params) <= 1e-5
    assert largest_difference(looped.batch_stats, scanned.batch_stats) <= 1e-5
    assert logs == pytest.approx(scan_logs, rel=1e-4)


def test_one_device_and_four_agree(make_training, pictures):
    # Batch norm in training mode takes its statistics over the whole batch, and each example's
    # augmentation and dropout depend on its place in the batch, not on the device it lies on.
    training = make_training(
        groups={"frozen": "", "low": "stem,stage.,features", "high": "head"}, optim=smooth_optim()
    )
    one, logs = run(training, pictures, 5)
    four, four_logs = run(training, pictures, 5, devices=4)
    assert len(jax.tree.leaves(four.params)[0].sharding.device_set) == 4
    assert largest_difference(one.params, training.variables["params"]) > 1e-3
    assert largest_difference(one.params, four.params) <= 1e-5
    assert largest_difference(one.batch_stats, four.batch_stats) <= 1e-5
    assert logs == pytest.approx(four_logs, rel=1e-4)


def test_step_and_evaluation_run_under_strict_promotion(make_training):
    groups = {group: {"weight_decay": 0.1, "clip": 1.0} for group in ("low", "high")}
    training = make_training(optim={"name": "sgd", "momentum": 0.9, **groups}, ema=0.9)
    shapes = {
        "image": jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.uint8),
        "target": jax.ShapeDtypeStruct((4,), jnp.int32),
    }
    with jax.numpy_dtype_promotion("strict"):
        step = functools.partial(train_step, parts=training.parts)
        state, _ = jax.eval_shape(step, training.state(), shapes, KEY)
        evaluate = functools.partial(
            eval_step, model=training.parts.model, spec=training.parts.spec
        )
        logits = jax.eval_shape(evaluate, training.variables, shapes["image"])
    before = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(training.state())]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)] == before
    assert (logits.shape, logits.dtype) == ((4, 3), jnp.float32)


def test_bfloat16_compute_keeps_a_float32_state(make_training, pictures):
    training = make_training(dtype=jnp.bfloat16)
    state, logs = run(training, pictures, 2)
    kinds = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.batch_stats))}
    assert kinds == {jnp.dtype("float32")} and np.isfinite(logs["loss"])


def test_named_keys_are_the_same_in_every_process():
    found = named_key(KEY, "augment")
    wanted = jax.random.fold_in(KEY, zlib.crc32(b"augment") & 0x7FFFFFFF)
    assert zlib.crc32(b"augment") & 0x7FFFFFFF == 0x6B167A19
    assert jax.random.key_data(found).tolist() == jax.random.key_data(wanted).tolist()
    names = ("augment", "dropout", "mixup", "domain", "member", "init")
    drawn = {tuple(jax.random.key_data(named_key(KEY, name)).tolist()) for name in names}
    assert len(drawn) == len(names)


def lite_flops(frozen, low):
    """XLA's count for the compiled step of the first blocks of Lite0: nothing is run."""
    stages = (StageSpec(1, 3, 1, 1, 16), StageSpec(1, 3, 2, 6, 24), StageSpec(1, 5, 2, 6, 40))
    model = EfficientNetLite(2, stages=stages, stem_width=32, top_width=320)
    spec = registry.model_spec("efficientnet_lite0")
    spec = dataclasses.replace(spec, stages=("stem", "stage1", "stage2", "stage3", "features"))
    shapes = registry.variable_shapes(model, 128)
    table = assign_stages(
        (*spec.stages, spec.head), {"frozen": frozen, "low": low, "high": spec.head}
    )
    groups = {group: {"weight_decay": 1e-4, "clip": 1.0} for group in ("low", "high")}
    schedules = {
        group: lambda step: jnp.float32(1e-3) for group in set(table.values()) - {"frozen"}
    }
    labels = label_tree(shapes["params"], table)
    parts = StepParts(
        model=model,
        spec=spec,
        optimizer=make_optimizer({"name": "adamw", "momentum": 0.9, **groups}, labels, schedules),
        table=table,
        labels=labels,
        terms=(Term("new", 1.0, cross_entropy(np.ones(2, np.float32), 0.0)),),
        augment=make_augment({"flip_horizontal": 0.5}),
    )
    state = jax.eval_shape(lambda variables: create_state(variables, parts), shapes)
    batch = {
        "image": jax.ShapeDtypeStruct((32, 128, 128, 1), jnp.uint8),
        "target": jax.ShapeDtypeStruct((32,), jnp.int32),
    }
    step = jax.jit(functools.partial(train_step, parts=parts))
    flops = step.lower(state, batch, KEY).compile().cost_analysis()["flops"]
    assert math.isfinite(flops) and flops > 1e9
    return flops


@pytest.mark.slow
def test_a_frozen_backbone_has_no_backward_pass(monkeypatch):
    backbone = "stem,stage.,features"
    full = lite_flops("", backbone)
    frozen = lite_flops(backbone, "")
    assert frozen <= 0.45 * full, frozen / full
    # A norm over all gradients would keep the backward pass alive without the stop_gradient.
    monkeypatch.setattr(
        step_module, "group_norms", lambda gradients, labels: {"all": optax.tree.norm(gradients)}
    )
    logged = lite_flops(backbone, "")
    assert logged <= 0.45 * full, logged / full
