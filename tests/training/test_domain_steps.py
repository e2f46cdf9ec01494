"""Unlabelled images of a target in the train step: what they move, and what they may not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from medtl_jax.domain.adversary import DISCRIMINATOR, Discriminator, dann, ramp
from medtl_jax.domain.alignment import TARGET_DOMAIN, align_coral, align_mmd
from medtl_jax.domain.statistics import split_domains
from medtl_jax.training.devices import data_mesh
from medtl_jax.training.runner import Feed
from medtl_jax.training.step import Term, create_state, train_step
from medtl_jax.transfer.groups import label_tree
from medtl_jax.transfer.optim import make_optimizer

KEY = jax.random.key(3)
OWN = "domain1"
MMD = align_mmd()


@pytest.fixture
def step(make_training, pictures):
    """`step(target=, domain=, strength=, ...) -> (before, after, logged)`, variables flat."""

    def call(target, domain=0, strength=0.0, term=MMD, devices=1, **fields):
        two = {"domains": 2} if domain else {}
        training = make_training(augment={}, dropout=0.0, **two)
        variables = jax.tree.map(jnp.array, training.variables)
        if domain:
            variables = jax.tree.map(jnp.copy, split_domains(variables))
        other = (Term("domain", 1.0, term),) if term else ()
        parts = dataclasses.replace(
            training.parts,
            terms=(*training.parts.terms, *other),
            adaptation=lambda step: jnp.float32(strength),
            target_domain=domain,
            **fields,
        )
        batch = {name: array[:8] for name, array in pictures.items()}
        batch[TARGET_DOMAIN] = {"image": target, "target": np.zeros((len(target), 0), np.int8)}
        state = create_state(variables, parts)
        before = jax.tree.map(
            np.asarray, {"params": state.params, "batch_stats": state.batch_stats}
        )
        mesh = data_mesh(devices)
        state = jax.device_put(state, mesh.replicated)
        batch = jax.device_put(batch, mesh.batched)
        state, logged = jax.jit(functools.partial(train_step, parts=parts))(state, batch, KEY)
        after = {"params": state.params, "batch_stats": state.batch_stats}
        return *(flatten_dict(tree, sep="/") for tree in (before, after)), logged

    return call


@pytest.fixture
def targets(pictures):
    """Two batches of target images that have nothing in common; of another size than 8."""
    return 255 - pictures["image"][8:20], pictures["image"][20:32] // 4


def differing(first, second):
    return {name for name in first if not np.array_equal(first[name], second[name])}


def test_the_statistics_of_the_source_are_of_the_source_alone(step, targets):
    """Whether the target has its own or not, and though its features are trained on."""
    for domain in (0, 1):
        _, plain, _ = step(targets[0], domain)
        _, other, _ = step(targets[1], domain)
        moved = differing(plain, other)
        assert {name.split("/")[-2] for name in moved} == ({OWN} if domain else set())
        assert all(name.startswith("batch_stats/") for name in moved)


def test_at_strength_0_and_above_it(step, targets):
    before, plain, _ = step(targets[0], term=None)
    _, zero, _ = step(targets[0])
    assert not differing(plain, zero)
    _, own, _ = step(targets[0], domain=1)
    assert not differing(plain, {name: own[name] for name in plain})
    _, some, _ = step(targets[0], strength=1.0)
    trained = {name for name in differing(before, plain) if name.startswith("params/")}
    # The features reach the term and the head does not.
    aligned = {name for name in trained if not name.startswith("params/head/")}
    assert differing(plain, some) == aligned and len(aligned) > 3


@pytest.mark.parametrize("term", [MMD, align_coral()], ids=["mmd", "coral"])
def test_four_devices_compare_the_whole_batches(step, targets, term):
    """Of 8 and 12 images: two and three a device would have other distances and covariances."""
    _, one, logged = step(targets[0], domain=1, strength=1.0, term=term)
    _, four, on_four = step(targets[0], domain=1, strength=1.0, term=term, devices=4)
    assert float(logged["loss_domain"]) > 0
    for name, value in logged.items():
        np.testing.assert_allclose(on_four[name], value, rtol=1e-3, err_msg=name)
    # Adam makes steps of gradients that are rounding: the parameters are not to be compared.
    for name in one:
        if name.startswith("batch_stats/"):
            np.testing.assert_allclose(four[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_at_lambda_0_a_discriminator_learns_and_the_network_as_without_one(
    make_training, pictures, targets
):
    training = make_training(augment={}, dropout=0.0)
    variables = jax.tree.map(jnp.array, training.variables)
    image = jnp.zeros((2, 16, 16, 3), jnp.float32)
    logits, out = jax.eval_shape(training.parts.model.apply, variables, image)
    term = dann(Discriminator(8))
    drawn = term.initialize({**out, "logits": logits}, jax.random.key(1))
    params = {**variables["params"], DISCRIMINATOR: drawn}
    table = {**training.parts.table, DISCRIMINATOR: DISCRIMINATOR}
    labels, section = label_tree(params, table), {"weight_decay": 0.1, "clip": 1.0}
    optim = {"name": "adamw", "momentum": 0.9} | dict.fromkeys(("low", "high"), section)
    optim[DISCRIMINATOR] = section
    schedules = {
        group: lambda step, rate=rate: jnp.float32(rate)
        for group, rate in (("low", 1e-3), ("high", 1e-2), (DISCRIMINATOR, 1e-2))
    }
    adapting = dataclasses.replace(
        training.parts,
        labels=labels,
        optimizer=make_optimizer(optim, labels, schedules),
        terms=(*training.parts.terms, Term("domain", 1.0, term)),
        adaptation=lambda step: jnp.zeros(()),
    )
    batch = {name: array[:8] for name, array in pictures.items()}
    both = {
        **batch,
        TARGET_DOMAIN: {"image": targets[0], "target": np.zeros((12, 0), np.int8)},
    }
    plain, state = training.state(), create_state({**variables, "params": params}, adapting)
    for _ in range(3):
        plain, _ = jax.jit(functools.partial(train_step, parts=training.parts))(plain, batch, KEY)
        state, _ = jax.jit(functools.partial(train_step, parts=adapting))(state, both, KEY)
    learned = {name: tree for name, tree in state.params.items() if name != DISCRIMINATOR}
    jax.tree.map(np.testing.assert_array_equal, learned, plain.params)
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, plain.batch_stats)
    for before, after in zip(
        jax.tree.leaves(drawn), jax.tree.leaves(state.params[DISCRIMINATOR]), strict=True
    ):
        assert not np.array_equal(before, after)


def test_frozen_stages_are_moved_in_no_domain(step, targets):
    before, after, _ = step(targets[0], domain=1, strength=1.0)
    for name in before:
        frozen = name.split("/")[1] in ("stem", "stage1")
        if frozen or name.startswith("batch_stats/"):
            assert (name in differing(before, after)) != frozen, name
    assert any(OWN in name for name in before if "/stem/" in name)


def test_the_strength_is_that_of_the_step(make_training, pictures, targets):
    training = make_training(augment={}, dropout=0.0)
    found = []
    term = Term(
        "domain",
        1.0,
        lambda out, batch, params, anchor: (batch["adaptation"], jnp.ones(())),
        logs=lambda out, batch, params: {"seen": batch["adaptation"]},
    )
    parts = dataclasses.replace(
        training.parts,
        terms=(*training.parts.terms, term),
        adaptation=lambda step: ramp(step, 4, 0.5),
    )
    state = create_state(jax.tree.map(jnp.array, training.variables), parts)
    batch = {name: array[:8] for name, array in pictures.items()}
    batch[TARGET_DOMAIN] = {"image": targets[0], "target": np.zeros((12, 0), np.int8)}
    run = jax.jit(functools.partial(train_step, parts=parts))
    for _ in range(3):
        state, logged = run(state, batch, KEY)
        assert logged["seen"] == logged["loss_domain"]
        found.append(float(logged["seen"]) / 8)
    wanted = [0.5 * (2 / (1 + np.exp(-10 * p)) - 1) for p in (0, 0.25, 0.5)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_the_target_is_drawn_in_an_order_of_its_own():
    """Two sorted sets of one length: with one order, labels of the one were those of the other."""
    arrays = {"image": np.zeros((40, 1)), "target": np.zeros(40)}
    rows = Feed({"train": arrays, TARGET_DOMAIN: arrays}).indices(0, 0, 5, 8)
    assert sorted(rows["train"].ravel()) == sorted(rows[TARGET_DOMAIN].ravel()) == list(range(40))
    assert (rows["train"] == rows[TARGET_DOMAIN]).mean() < 0.2
    # Of 3 images each is drawn as often as any other, and none is left out.
    few = {"image": np.zeros((3, 1)), "target": np.zeros(3)}
    rows = Feed({"train": arrays, TARGET_DOMAIN: few}).indices(0, 0, 6, 8)[TARGET_DOMAIN]
    assert rows.shape == (6, 8) and np.bincount(rows.ravel()).tolist() == [16, 16, 16]
