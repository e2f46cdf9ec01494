"""GoogLeNet in Caffe's form against torch on drawn weights, read from an .npz with Caffe's keys."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from medtl_jax.models import inception, registry
from medtl_jax.weights.pretrained import fill, open_pretrained

TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
VISIBLE = 1e-2


@pytest.fixture(scope="module")
def stored():
    return reference.load_reference(reference.CAFFE_ARCHITECTURE)


@pytest.fixture(scope="module")
def network(stored, tmp_path_factory):
    """`(model, variables)`, loaded from a file as a user's weights are."""
    path = tmp_path_factory.mktemp("caffe") / "drawn.npz"
    np.savez(path, **reference.state_dict(stored))
    model, spec = registry.create_model(stored.name, 1000)
    shapes = registry.variable_shapes(model, stored.sizes[0])
    variables, report = fill(shapes, open_pretrained(spec, path))
    assert len(report.loaded) == len(stored.shapes) and not report.kept and not report.skipped
    return model, variables


def logits_of(network, size):
    # A new function each time: `jit` would give back the program of an unpatched model.
    forward = jax.jit(lambda variables, images: network[0].apply(variables, images)[0])
    return np.asarray(forward(network[1], reference.drawn_input(size)))


def differs(logits, stored, size):
    """Relative error of the first logits of each image, or of all logits' norms if that is more."""
    wanted = stored.values[f"logits_{size}"]
    first = reference.relative_error(logits[:, : wanted.shape[1]], wanted)
    norms = np.linalg.norm(logits, axis=1)
    return max(first, reference.relative_error(norms, stored.values[f"logits_norm_{size}"]))


def test_as_many_parameters_as_the_paper_form(stored):
    """6,998,552 without auxiliary heads, as in the model zoo's file."""
    assert stored.num_parameters == 6_998_552
    assert sum(math.prod(shape) for shape in stored.shapes.values()) == 6_998_552


@pytest.mark.parametrize("size", [64, 75])
def test_logits(network, stored, size):
    assert size in stored.sizes
    assert differs(logits_of(network, size), stored, size) <= TOLERANCE


def test_gradient_at_an_image(network, stored):
    model, variables = network

    @jax.jit
    def differentiate(variables, image):
        return jax.grad(lambda x: model.apply(variables, x)[0].sum())(image)

    found = np.asarray(differentiate(variables, reference.gradient_input(stored)))[0]
    wanted, norm = stored.values["gradient"], float(stored.values["gradient_norm"])
    step = -(-len(found) // len(wanted))
    assert reference.relative_error(found[::step, ::step], wanted) <= GRADIENT_TOLERANCE
    assert float(np.linalg.norm(found)) == pytest.approx(norm, rel=GRADIENT_TOLERANCE)


@pytest.mark.parametrize("left_out", [0, 1])
def test_the_reference_sees_each_response_normalisation(network, stored, monkeypatch, left_out):
    normalize, calls = inception.local_response_norm, itertools.count()

    def all_but_one(x, *settings):
        return x if next(calls) == left_out else normalize(x, *settings)

    monkeypatch.setattr(inception, "local_response_norm", all_but_one)
    assert differs(logits_of(network, 64), stored, 64) > VISIBLE
    assert next(calls) == 2


def test_the_reference_sees_the_order_of_colours(network, stored):
    model, variables = network
    forward = jax.jit(lambda variables, images: model.apply(variables, images)[0])
    swapped = np.asarray(forward(variables, reference.drawn_input(64)[..., ::-1]))
    assert differs(swapped, stored, 64) > VISIBLE


def test_the_reference_sees_the_biases(network, stored):
    model, variables = network

    def without_bias(path, leaf):
        return jnp.zeros_like(leaf) if path[-1].key == "bias" else leaf

    variables = jax.tree_util.tree_map_with_path(without_bias, variables)
    # The activations are of order 50, the biases 0.1.
    assert differs(logits_of((model, variables), 64), stored, 64) > 10 * TOLERANCE
