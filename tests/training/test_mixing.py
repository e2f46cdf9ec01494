"""Mixup and CutMix in the train step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medtl_jax.augment.mix import Mix, mix_batch
from medtl_jax.domain.alignment import TARGET_DOMAIN
from medtl_jax.keys import named_key
from medtl_jax.models.inputs import normalize
from medtl_jax.training.step import Term, train_step

KEY = jax.random.key(7)


def test_the_loss_of_a_step_is_that_of_its_mixed_batch(make_training, pictures):
    training = make_training(augment={}, dropout=0.0)
    parts = dataclasses.replace(training.parts, mix=Mix(mixup=1.0))
    batch = {name: array[:8] for name, array in pictures.items()}
    state = training.state()
    _, logged = jax.jit(functools.partial(train_step, parts=parts))(state, batch, KEY)
    image = normalize(jnp.asarray(batch["image"]), parts.spec.input)
    key = named_key(jax.random.fold_in(KEY, 0), "mixup")
    mixed = mix_batch(key, {**batch, "image": image}, parts.mix)
    (logits, _), _ = parts.model.apply(
        training.variables, mixed["image"], True, ("stem", "stage1"), mutable=["batch_stats"]
    )
    share, log_probability = mixed["partner"]["share"], jax.nn.log_softmax(logits)
    # The training's label smoothing is 0.1.
    labels = [0.9 * jax.nn.one_hot(target, 3) + 0.1 / 3 for target in (
        mixed["target"], mixed["partner"]["target"])]  # fmt: skip
    label = share * labels[0] + (1 - share) * labels[1]
    wanted = -(label * log_probability).sum(-1).mean()
    assert 0.01 < share < 0.99
    np.testing.assert_allclose(logged["loss"] / 8, wanted, rtol=1e-4)


def test_images_of_a_target_are_mixed_by_a_draw_of_their_own(make_training, pictures):
    """As those that are trained on are, or a discriminator could tell them by it."""

    def term(out, batch, params, anchor):
        return batch[TARGET_DOMAIN]["image"].sum() * 0, jnp.ones(())

    def logs(out, batch, params):
        target = batch[TARGET_DOMAIN]
        return {"share": target["partner"]["share"], "mean": target["image"].mean()}

    training = make_training(augment={}, dropout=0.0)
    parts = dataclasses.replace(
        training.parts,
        mix=Mix(mixup=1.0),
        terms=(*training.parts.terms, Term("domain", 1.0, term, logs=logs)),
        adaptation=lambda step: jnp.float32(1.0),
    )
    batch = {name: array[:8] for name, array in pictures.items()}
    target = {"image": pictures["image"][8:16], "target": np.zeros((8, 0), np.int8)}
    run = jax.jit(functools.partial(train_step, parts=parts))
    _, logged = run(training.state(), {**batch, TARGET_DOMAIN: target}, KEY)
    key = jax.random.fold_in(KEY, 0)
    image = normalize(jnp.asarray(target["image"]), parts.spec.input)
    mixed = [
        mix_batch(named_key(key, name), {**target, "image": image}, parts.mix)
        for name in ("target_domain_mixup", "mixup")
    ]
    share = float(logged["share"]) / 8
    assert share == pytest.approx(float(mixed[0]["partner"]["share"]), rel=1e-5)
    assert abs(share - mixed[1]["partner"]["share"]) > 1e-3
    np.testing.assert_allclose(logged["mean"] / 8, mixed[0]["image"].mean(), rtol=1e-4)
