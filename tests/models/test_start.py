"""A network run from one of its parts on, and the classifier that came with its weights."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medtl_jax.models import registry

# Members of the families as small as the fields of their modules make them.
FAMILIES = {
    "lenet5": {},
    "resnet18": {"depths": (1, 1, 1, 1)},
    "densenet121": {"layers": (1, 1, 1, 1)},
}


def drawn(model, size):
    """Variables whose statistics are none that a norm begins with."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape, np.float32)
        if path[-1].key == "var":
            return 1 + np.abs(values)
        return values / np.float32(np.sqrt(max(np.prod(leaf.shape[:-1]), 1)))

    return jax.tree_util.tree_map_with_path(draw, registry.variable_shapes(model, size))


@functools.partial(jax.jit, static_argnums=(0, 3))
def evaluated(model, variables, x, start):
    return model.apply(variables, x, start=start)


@pytest.fixture
def network(request, tiny_model):
    """`(model, spec, variables, image)` of a family, or of the tiny model."""
    if request.param == "tiny":
        model, spec = tiny_model(3, source_classes=5)
    else:
        fields = {**FAMILIES[request.param], "source_classes": 5}
        model, spec = registry.create_model(request.param, 3, **fields)
    size = max(16, spec.smallest_input)
    image = np.random.default_rng(1).standard_normal((2, size, size, 3), np.float32)
    return model, spec, drawn(model, size), image


@pytest.mark.parametrize("network", ["tiny", *FAMILIES], indirect=True)
def test_from_any_part_on_the_rest_is_the_same(network):
    model, spec, variables, image = network
    logits, out = evaluated(model, variables, image, "")
    parts = [*spec.stages, spec.head]
    for before, start in itertools.pairwise(parts):
        # What the head reads is pooled where the network's last stage is a map.
        x = out["features" if start == "head" else before]
        found, rest = evaluated(model, variables, x, start)
        np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)
        after = set(parts[parts.index(start) : -1])
        assert rest.keys() == after | {"features", "source_logits"}
        for name, array in rest.items():
            np.testing.assert_allclose(array, out[name], rtol=1e-4, atol=1e-5, err_msg=name)
    _, whole = evaluated(model, variables, image, spec.stages[0])
    assert whole.keys() == out.keys()


@pytest.mark.parametrize("network", ["tiny"], indirect=True)
def test_training_from_a_part_on_is_training_with_the_parts_before_it_frozen(network):
    model, _, variables, image = network
    frozen = ("stem", "stage1")

    @functools.partial(jax.jit, static_argnums=1)
    def step(x, start):
        rngs = {"dropout": jax.random.key(3)}
        return model.apply(
            variables, x, True, frozen, start=start, rngs=rngs, mutable=["batch_stats"]
        )

    (logits, out), moved = step(image, "")
    (found, _), from_there = step(out["stage1"], "stage2")
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)
    for part, tree in moved["batch_stats"].items():
        same = jax.tree.map(np.array_equal, tree, variables["batch_stats"][part])
        assert all(jax.tree.leaves(same)) == (part in frozen), part
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5),
            tree,
            from_there["batch_stats"][part],
        )


@pytest.mark.parametrize("network", ["tiny", "lenet5"], indirect=True)
def test_a_start_that_is_no_part_is_refused(network):
    model, spec, variables, image = network
    for start in ("stage9", "source_head", "stag"):
        with pytest.raises(ValueError, match=f"start='{start}' of a network of {spec.stages[0]}"):
            model.apply(variables, image, start=start)


def test_a_decoder_reads_all_maps_and_has_no_start(tiny_model):
    model, _ = tiny_model(3, decoder=(4, 4))
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    for start in ("stage2", "head"):
        with pytest.raises(ValueError, match=f"start='{start}' of a network"):
            jax.eval_shape(functools.partial(model.init, start=start), jax.random.key(0), image)


@pytest.mark.parametrize("network", ["tiny", "lenet5"], indirect=True)
def test_the_classifier_of_the_weights_reads_the_same_features(network):
    model, _, variables, image = network
    logits, out = evaluated(model, variables, image, "")
    for name, found in (("head", logits), ("source_head", out["source_logits"])):
        head = variables["params"][name]
        wanted = np.asarray(out["features"]) @ head["kernel"] + head["bias"]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert out["source_logits"].shape == (2, 5) and out["source_logits"].dtype == jnp.float32


def test_without_one_there_is_none():
    model, _ = registry.create_model("lenet5", 3)
    image = jax.ShapeDtypeStruct((1, 28, 28, 3), jnp.float32)
    (_, out), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    assert "source_logits" not in out and "source_head" not in variables["params"]
