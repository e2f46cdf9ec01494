"""The gradient in parts, and stages computed again: the same step with less memory."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from medtl_jax.augment.mix import Mix
from medtl_jax.data.catalog import MISSING
from medtl_jax.errors import UserError
from medtl_jax.models.inputs import normalize
from medtl_jax.models.registry import create_model, initialize
from medtl_jax.objectives.losses import binary_cross_entropy, cross_entropy, huber, ordinal
from medtl_jax.training.devices import check_batch_size, data_mesh
from medtl_jax.training.step import Term, create_state, train_step
from medtl_jax.transfer.groups import label_tree

KEY = jax.random.key(7)
ALL = {"frozen": "", "low": "", "high": ".*"}


@pytest.fixture
def batch(pictures):
    return {"image": pictures["image"][:24], "target": pictures["target"][:24]}


def stepped(training, batch, devices=1, **fields):
    """`(state, logs, planned bytes of temporary values)` of one step from the start."""
    parts, mesh = dataclasses.replace(training.parts, **fields), data_mesh(devices)
    state = create_state(jax.tree.map(jax.numpy.array, training.variables), parts)
    placed = jax.device_put(batch, mesh.batched)
    program = jax.jit(lambda state, batch: train_step(state, batch, KEY, parts=parts))
    compiled = program.lower(jax.device_put(state, mesh.replicated), placed).compile()
    state, logs = compiled(jax.device_put(state, mesh.replicated), placed)
    return state, logs, compiled.memory_analysis().temp_size_in_bytes


def assert_close(found, wanted, **tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, **{"rtol": 1e-5, "atol": 2e-6, **tolerance})


@pytest.fixture
def without_norms(make_training, batch):
    """`(training, batch)` of a LeNet-5, which has neither batch norms nor dropout, at 32 pixels."""
    training = make_training()
    model, spec = create_model("lenet5", 3)
    variables = jax.tree.map(np.array, initialize(model, 32, jax.random.key(1)))
    table = dict.fromkeys((*spec.stages, spec.head), "high")
    parts = dataclasses.replace(
        training.parts,
        model=model,
        spec=spec,
        table=table,
        labels=label_tree(variables["params"], table),
        optimizer=optax.sgd(0.5),
    )
    large = {**batch, "image": batch["image"].repeat(2, axis=1).repeat(2, axis=2)}
    return dataclasses.replace(training, parts=parts, variables=variables), large


@pytest.mark.parametrize(
    ("count", "devices", "fields"),
    [(2, 1, {}), (6, 1, {"mix": Mix(mixup=0.4)}), (3, 4, {})],
    ids=["two", "mixed", "devices"],
)
def test_without_batch_norms_the_parts_make_the_step_of_the_whole(
    without_norms, count, devices, fields
):
    training, batch = without_norms
    whole, logs, _ = stepped(training, batch, **fields)
    state, parted, _ = stepped(training, batch, devices, accumulate=count, **fields)
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), whole.params, training.variables["params"]
    )
    assert min(jax.tree.leaves(moved)) > 1e-4
    assert_close(state.params, whole.params)
    assert_close(parted, logs)


def _unequal(task, rng):
    """`(term, target [24, ...])` whose counts differ between the parts `i % 4` of a batch."""
    if task == "classify":
        # Part 0 has the rarest class alone, and with it most of the weight.
        target = np.where(np.arange(24) % 4 == 0, 2, rng.integers(0, 2, 24)).astype(np.int32)
        return cross_entropy(np.float32([0.3, 1.5, 5.0]), 0.1), target
    if task == "corn":
        target = np.where(np.arange(24) % 4 == 0, 3, rng.integers(0, 2, 24)).astype(np.int32)
        return ordinal(np.float32([0.3, 1.5, 1.0, 5.0]), "corn"), target
    known = (rng.random((24, 3)) < 0.5) & (np.arange(24) % 4 != 1)[:, None]
    if task == "multilabel":
        target = np.where(known, rng.integers(0, 2, (24, 3)), MISSING).astype(np.int32)
        return binary_cross_entropy(np.float32([0.5, 2.0, 4.0])), target
    target = np.where(known, rng.normal(5.0, 2.0, (24, 3)), np.nan).astype(np.float32)
    return huber(np.full(3, 5.0), np.full(3, 2.0)), target


@pytest.mark.parametrize(
    ("task", "mix"),
    [
        ("classify", None),
        ("corn", None),
        ("multilabel", None),
        ("regress", None),
        ("classify", Mix(mixup=0.4)),
        ("multilabel", Mix(cutmix=1.0)),
    ],
)
def test_a_mean_is_over_the_whole_batch_whatever_the_counts_of_its_parts(without_norms, task, mix):
    training, batch = without_norms
    term, target = _unequal(task, np.random.default_rng(3))
    batch = {**batch, "target": target}
    # Two of them, as a head and an auxiliary head are.
    terms = (Term("new", 1.0, term), Term("new", 1.0, term, factor=0.3))
    # With this rate the update is the gradient.
    fields = {"terms": terms, "mix": mix, "optimizer": optax.sgd(1.0)}
    whole, logs, _ = stepped(training, batch, **fields)
    state, parted, _ = stepped(training, batch, accumulate=4, **fields)
    before = training.variables["params"]
    updates, wanted = (jax.tree.map(np.subtract, one.params, before) for one in (state, whole))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted)) > 0.01
    assert_close(updates, wanted, rtol=1e-5, atol=1e-5)
    assert_close(parted, logs)


def test_the_terms_of_other_names_keep_the_mean_of_the_parts_means(without_norms):
    training, batch = without_norms
    weights = np.float32([0.3, 1.5, 5.0])
    target = np.where(np.arange(24) % 4 == 0, 2, batch["target"] % 2).astype(np.int32)

    def term(out, batch, params, anchor):
        del out, params, anchor
        weight = jax.numpy.asarray(weights)[batch["target"]]
        return (weight * batch["target"]).sum(), weight.sum()

    batch = {**batch, "target": target}
    for name, groups in (("pre", [target[part::4] for part in range(4)]), ("new", [target])):
        _, logs, _ = stepped(training, batch, accumulate=4, terms=(Term(name, 1.0, term),))
        wanted = np.mean([np.average(rows, weights=weights[rows]) for rows in groups])
        np.testing.assert_allclose(logs["loss"] / 24, wanted, rtol=1e-5)


def test_batch_norms_see_each_part(make_training, batch):
    training = make_training(augment={}, dropout=0.0)
    state, _, _ = stepped(training, batch, accumulate=2)
    # By hand: the statistics move twice, with the images of even number and then with the others.
    variables = training.variables
    for first in (0, 1):
        image = normalize(batch["image"][first::2].astype(np.float32), training.parts.spec.input)
        _, moved = training.parts.model.apply(
            variables, image, True, ("stem", "stage1"), mutable=["batch_stats"]
        )
        variables = {**variables, **moved}
    assert_close(state.batch_stats, variables["batch_stats"])
    once = training.variables["batch_stats"]["stage2"]
    ratios = jax.tree.map(lambda a, b: (a / b).min(), state.batch_stats["stage2"], once)
    # Of a variance of 1, momentum 0.9 leaves 0.81 after two moves; once it would leave 0.9.
    assert min(leaf for leaf in jax.tree.leaves(ratios) if np.isfinite(leaf)) < 0.9


def test_the_memory_is_that_of_a_part(without_norms):
    training, batch = without_norms
    batch = {name: np.concatenate([array] * 16) for name, array in batch.items()}
    whole, parted = (stepped(training, batch, accumulate=count)[2] for count in (1, 4))
    assert parted < 0.6 * whole


def kept_bytes(training, batch, **fields):
    """Bytes that the backward pass of the network finds of the forward one."""
    image = normalize(batch["image"].astype(np.float32), training.parts.spec.input)

    def backward(params):
        variables = {**training.variables, "params": params}
        rngs = {"dropout": KEY}
        return jax.vjp(
            lambda params: training.parts.model.apply(
                {**variables, "params": params},
                image,
                True,
                rngs=rngs,
                mutable=["batch_stats"],
                **fields,
            )[0][0],
            params,
        )[1]

    shapes = jax.eval_shape(backward, training.variables["params"])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def test_stages_computed_again_make_the_same_step_and_keep_less(make_training, batch):
    training = make_training(ALL, dropout=0.3, drop_path=0.3)
    kept, logs, _ = stepped(training, batch, optimizer=optax.sgd(0.5))
    again, same, _ = stepped(training, batch, optimizer=optax.sgd(0.5), remat=True)
    assert_close(again.params, kept.params, atol=1e-5)
    assert_close(again.batch_stats, kept.batch_stats)
    assert_close(same, logs, rtol=1e-4)
    # Planned memory does not show it here: XLA's compiler for CPU computes nothing twice.
    assert kept_bytes(training, batch, remat=True) < 0.5 * kept_bytes(training, batch)


def test_a_batch_divides_into_its_parts_on_every_device():
    mesh = data_mesh(4)
    check_batch_size("data.batch_size", 24, mesh, 3)
    with pytest.raises(UserError, match=r"batch_size=16 must be a multiple of train.accumulate=3"):
        check_batch_size("data.batch_size", 16, mesh, 3)
