"""Dropout and drop-path: where the originals have them, and when they act."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medtl_jax.models import registry
from medtl_jax.models.classic import HiddenLayers
from medtl_jax.models.layers import DropPath, LayerSettings

# Rates by the path of the layer. torchvision's models, Szegedy et al. 2015 (0.4 before the
# classifier, 0.7 in the auxiliary ones) and efficientnet-lite-pytorch.
DROPOUTS = {
    "alexnet": {"features/dropout1": 0.5, "features/dropout2": 0.5},
    "vgg11": {"features/dropout2": 0.5, "dropout": 0.5},
    "vgg16_bn": {"features/dropout2": 0.5, "dropout": 0.5},
    "googlenet": {"aux1/dropout": 0.7, "aux2/dropout": 0.7, "dropout": 0.2},
    "googlenet_caffe": {"dropout": 0.4},
    "inception_v3": {"dropout": 0.5},
    "resnet18": {"dropout": 0.0},
    "densenet121": {"dropout": 0.0},
    "mobilenet_v2": {"dropout": 0.2},
    "efficientnet_b0": {"dropout": 0.2},
    "efficientnet_lite0": {"dropout": 0.2},
    "efficientnet_lite1": {"dropout": 0.2},
    "efficientnet_lite2": {"dropout": 0.3},
}
# Block i of the 16 drops with 0.2 i / 16; the first of a stage has a residual where neither the
# stride nor the width changes, which is nowhere.
B0_DROP_PATHS = {
    "stage2/block2": 2,
    "stage3/block2": 4,
    "stage4/block2": 6,
    "stage4/block3": 7,
    "stage5/block2": 9,
    "stage5/block3": 10,
    "stage6/block2": 12,
    "stage6/block3": 13,
    "stage6/block4": 14,
}


def layers_that_drop(name, train=True, frozen=(), **fields):
    """`(dropouts, drop_paths)` by path: the rate that each applies, 0 where it is switched off."""
    model, spec = registry.create_model(name, 2, **fields)
    size = spec.smallest_input
    dropouts, drop_paths = {}, {}

    def record(call, args, kwargs, context):
        layer, path = context.module, "/".join(context.module.path)
        if isinstance(layer, nn.Dropout):
            dropouts[path] = 0.0 if layer.deterministic else layer.rate
        if isinstance(layer, DropPath):
            drop_paths[path.removesuffix("/drop_path")] = layer.rate if kwargs["train"] else 0.0
        return call(*args, **kwargs)

    image = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with nn.intercept_methods(record):
        jax.eval_shape(lambda keys, x: model.init_with_output(keys, x, train, frozen), keys, image)
    return dropouts, drop_paths


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropouts_of_the_original(name):
    auxiliary = name == "googlenet"
    dropouts, drop_paths = layers_that_drop(name, auxiliary=auxiliary)
    assert dropouts == DROPOUTS[name]
    assert any(drop_paths.values()) == name.startswith("efficientnet")
    if name == "efficientnet_b0":
        assert drop_paths == pytest.approx({path: i / 80 for path, i in B0_DROP_PATHS.items()})


def test_drop_path_grows_to_its_rate_over_the_blocks_of_a_resnet():
    _, drop_paths = layers_that_drop("resnet18", drop_path=0.4)
    assert list(drop_paths.values()) == pytest.approx([0.05 * i for i in range(8)])


@pytest.mark.parametrize("name", ["alexnet", "googlenet", "efficientnet_lite0"])
def test_nothing_drops_in_evaluation(name):
    dropouts, drop_paths = layers_that_drop(name, train=False, auxiliary=name == "googlenet")
    assert dropouts and not any((*dropouts.values(), *drop_paths.values()))


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "googlenet", "efficientnet_lite0"])
def test_frozen_stages_drop_nothing(name):
    spec = registry.model_spec(name)
    frozen = (*spec.stages, "aux1")
    dropouts, drop_paths = layers_that_drop(name, frozen=frozen, auxiliary=name == "googlenet")
    expected = {path: rate for path, rate in DROPOUTS[name].items() if not path.startswith(frozen)}
    assert {path: rate for path, rate in dropouts.items() if rate} == expected
    assert not any(drop_paths.values())


def test_hidden_layers_drop_when_they_train_alone():
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
    layers = HiddenLayers((16, 16), 2, 2, 0.5, True, LayerSettings())
    variables = jax.jit(lambda x: layers.init(jax.random.key(1), x, update=False))(x)

    @functools.partial(jax.jit, static_argnames="update")
    def run(seed, update):
        return layers.apply(variables, x, update=update, rngs={"dropout": jax.random.key(seed)})

    evaluated = np.asarray(run(2, update=False))
    np.testing.assert_array_equal(evaluated, run(3, update=False))
    assert evaluated.any()
    drawn = np.asarray(run(2, update=True))
    np.testing.assert_array_equal(drawn, run(2, update=True))
    assert not np.allclose(drawn, run(3, update=True), rtol=1e-3)
    assert not np.allclose(drawn, evaluated, rtol=1e-3)


def test_drop_path_drops_whole_examples_and_rescales_the_others():
    rate, x = 0.25, jnp.ones((4000, 2, 1, 3)) * jnp.arange(1.0, 4.0)
    dropped = DropPath(rate).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    kept = np.asarray(dropped[:, 0, 0, 0]) > 0
    expected = kept[:, None, None, None] * np.asarray(x) / (1 - rate)
    np.testing.assert_allclose(dropped, expected, rtol=1e-6)
    # Five standard deviations of a binomial mean: 5 sqrt(0.75 * 0.25 / 4000).
    assert abs(kept.mean() - 0.75) < 0.035


@pytest.mark.parametrize(("rate", "train"), [(0.5, False), (0.0, True)])
def test_drop_path_without_effect_is_the_identity(rate, train):
    x = jnp.arange(12.0).reshape(2, 3, 2, 1)
    np.testing.assert_array_equal(DropPath(rate).apply({}, x, train=train), x)


def test_dropout_and_drop_path_of_a_network_act_in_training_alone(tiny_model):
    model, _ = tiny_model(dropout=0.5, drop_path=0.5)
    variables = registry.initialize(model, 16, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    frozen = ("stem", "stage1", "stage2", "features")

    @jax.jit
    def logits(key, x):
        return model.apply(variables, x, True, frozen, rngs={"dropout": key})[0]

    evaluated = jax.jit(lambda x: model.apply(variables, x)[0])(x)
    drawn = [np.asarray(logits(jax.random.key(seed), x)) for seed in (3, 3, 4)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], drawn[2], rtol=1e-3)
    assert not np.allclose(drawn[0], evaluated, rtol=1e-3)
