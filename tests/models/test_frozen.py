"""Running statistics in training: those of frozen stages stay, the others move."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medtl_jax.models import registry
from medtl_jax.models.mobile import StageSpec

TINY_BLOCKS = (StageSpec(1, 3, 1, 1, 8), StageSpec(2, 3, 2, 2, 8))
# A member of each family with batch norms, as small as the fields of its module make it.
FAMILIES = {
    "baseline_cnn": {},
    "vgg16_bn": {"depths": (1, 1, 1, 1), "hidden": False},
    "googlenet": {"auxiliary": True},
    "inception_v3": {},
    "resnet18": {"depths": (1, 1, 1, 1)},
    "resnet50": {"depths": (1, 1, 1, 1)},
    "densenet121": {"layers": (1, 1, 1, 1)},
    "mobilenet_v2": {"stages": TINY_BLOCKS},
    "efficientnet_b0": {"stages": TINY_BLOCKS},
    "efficientnet_lite0": {"stages": TINY_BLOCKS},
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def step(model, frozen, variables, image):
    rngs = {"dropout": jax.random.key(1)}
    _, moved = model.apply(variables, image, True, frozen, rngs=rngs, mutable=["batch_stats"])
    return moved["batch_stats"]


def drawn(shapes):
    """Variables drawn on the host: compiling `init` would take as long as the step."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name != "kernel":
            return np.full(leaf.shape, float(name in ("scale", "var")), np.float32)
        deviation = np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))
        return deviation * rng.standard_normal(leaf.shape, np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_stages_keep_their_statistics_and_the_others_move(name):
    model, spec = registry.create_model(name, 3, momentum=0.5, **FAMILIES[name])
    size = spec.smallest_input
    image = jax.random.normal(jax.random.key(2), (4, size, size, 3))
    frozen = ("stem", "stage2", "aux1")
    variables = drawn(registry.variable_shapes(model, size))
    before, after = variables["batch_stats"], step(model, frozen, variables, image)
    assert before.keys() == after.keys()
    assert "stem" in before and len(set(before) - set(frozen)) >= 2
    assert ("aux1" in before) == ("aux2" in before) == (name == "googlenet")
    for part, statistics in before.items():
        pairs = zip(jax.tree.leaves(statistics), jax.tree.leaves(after[part]), strict=True)
        same = [np.array_equal(a, b) for a, b in pairs]
        assert all(same) if part in frozen else not any(same), part


def test_a_frozen_network_trains_with_the_logits_of_evaluation(tiny_model):
    model, spec = tiny_model(dropout=0.0)
    variables = drawn(registry.variable_shapes(model, 16))
    variables["batch_stats"] = jax.tree.map(lambda x: x + 0.5, variables["batch_stats"])
    x = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def logits(train, frozen, x):
        rngs = {"dropout": jax.random.key(2)}
        (logits, _), _ = model.apply(
            variables, x, train, frozen, rngs=rngs, mutable=["batch_stats"]
        )
        return logits

    evaluated = logits(False, (), x)
    np.testing.assert_array_equal(evaluated, logits(True, spec.stages, x))
    assert float(jnp.abs(evaluated - logits(True, (), x)).max()) > 1e-3
