"""Every architecture against torch on drawn weights: logits, their gradient, batch statistics."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from medtl_jax.models import registry
from medtl_jax.models.layers import DropPath
from medtl_jax.weights import tables
from medtl_jax.weights.merge import merge_weights
from medtl_jax.weights.naming import choose_naming, to_linen

# Siblings of other depth in a family of which a member is compared each time; a VGG draws 130
# million weights.
SLOW = {
    "vgg13",
    "vgg16",
    "vgg19",
    "vgg11_bn",
    "vgg13_bn",
    "vgg16_bn",
    "vgg19_bn",
    "resnet34",
    "resnet101",
    "tf_efficientnet_lite1",
    "tf_efficientnet_lite2",
}
# The architectures with logits at the sizes of their own training in ../shared.
FULL_SIZE = [
    name for name in reference.ARCHITECTURES if name not in ("vgg11_bn", "vgg13_bn", "vgg19_bn")
]
TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
TRAIN_TOLERANCE = 1e-3


def marked(names):
    return [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in names]


def our_name(name):
    return name.removeprefix("tf_")


def with_drawn_weights(name, shapes):
    """`(model, variables)` with torch's tensors of the drawn state dict, all loaded strictly."""
    spec = registry.model_spec(our_name(name))
    model, _ = registry.create_model(spec.name, 1000, auxiliary=bool(spec.auxiliary))
    naming = choose_naming(spec.name, tables.namings(spec.name), list(shapes))
    flat = {}
    for key, shape in shapes.items():
        # One at a time: the first dense layer of a VGG takes 0.4 GB, each of its copies as well.
        flat |= to_linen(naming, {key: reference.drawn_tensor(key, shape)})
    size = max(spec.smallest_input, spec.smallest_auxiliary)
    variables, report = merge_weights(registry.variable_shapes(model, size), flat)
    assert not report.kept and not report.skipped
    return model, variables


@pytest.fixture(scope="module", params=marked(reference.ARCHITECTURES))
def network(request):
    """`(reference, model, variables)`; one architecture is in memory at a time."""
    stored = reference.load_reference(request.param)
    return stored, *with_drawn_weights(stored.name, stored.shapes)


jit_of_model = functools.partial(jax.jit, static_argnums=0)


@jit_of_model
def evaluate(model, variables, images):
    return model.apply(variables, images)[0]


@jit_of_model
def differentiate(model, variables, images):
    """The logits and d(sum of logits)/d(images): an image's gradient sees no other image."""

    def total(images):
        logits = model.apply(variables, images)[0]
        return logits.sum(), logits

    gradient, logits = jax.grad(total, has_aux=True)(images)
    return logits, gradient


@jit_of_model
def train(model, variables, images):
    """All logits by name, with batch statistics and without dropout, as in the reference."""

    def skip_dropout(call, args, kwargs, context):
        dropout = isinstance(context.module, nn.Dropout | DropPath)
        return args[0] if dropout and context.method_name == "__call__" else call(*args, **kwargs)

    with nn.intercept_methods(skip_dropout):
        (logits, out), _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
    return {"logits": logits, **{name: x for name, x in out.items() if name.startswith("aux")}}


def compare(logits, values, key, tolerance):
    """The first logits of each image, and the norm over all of them."""
    kind, size = key.rsplit("_", 1)
    wanted = values[key]
    assert logits.dtype == jnp.float32
    assert reference.relative_error(logits[:, : wanted.shape[1]], wanted) <= tolerance
    norms = np.linalg.norm(logits, axis=1)
    assert reference.relative_error(norms, values[f"{kind}_norm_{size}"]) <= tolerance


@pytest.mark.parametrize("name", reference.ARCHITECTURES)
def test_as_many_parameters_as_torch(name):
    spec = registry.model_spec(our_name(name))
    model, _ = registry.create_model(spec.name, 1000, auxiliary=bool(spec.auxiliary))
    size = max(spec.smallest_input, spec.smallest_auxiliary)
    params = registry.variable_shapes(model, size)["params"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count == reference.load_reference(name).num_parameters


def test_logits_and_their_gradient(network):
    stored, model, variables = network
    if stored.gradient_at:
        size, _ = stored.gradient_at
        images = [reference.gradient_input(stored)]
        if size in stored.sizes:  # one program for both
            images.append(reference.drawn_input(size))
        logits, gradient = differentiate(model, variables, np.concatenate(images))
        compare_gradient(np.asarray(gradient[0]), stored.values)
        if size in stored.sizes:
            compare(logits[1:], stored.values, f"logits_{size}", TOLERANCE)
    for size in set(stored.sizes) - set(stored.gradient_at[:1]):
        logits = evaluate(model, variables, reference.drawn_input(size))
        compare(logits, stored.values, f"logits_{size}", TOLERANCE)


def compare_gradient(found, values):
    """Every few pixels of the gradient, and the norm of all of it."""
    wanted, norm = values["gradient"], float(values["gradient_norm"])
    step = -(-len(found) // len(wanted))
    assert reference.relative_error(found[::step, ::step], wanted) <= GRADIENT_TOLERANCE
    assert float(np.linalg.norm(found)) == pytest.approx(norm, rel=GRADIENT_TOLERANCE)


def compare_trained(stored, model, variables, size):
    heads = [
        head
        for head in ("logits", "aux", "aux1", "aux2")
        if f"train_{head}_{size}" in stored.values
    ]
    model = model.clone(auxiliary=len(heads) > 1)
    if not model.auxiliary:
        variables = {
            kind: {part: tree for part, tree in parts.items() if not part.startswith("aux")}
            for kind, parts in variables.items()
        }
    found = train(model, variables, reference.drawn_input(size, batch=4))
    assert set(found) == set(heads)
    for head in heads:
        key = f"train_{head}_{size}"
        # Statistics of 16 values magnify rounding, in torch's own float32 as well.
        tolerance = max(TRAIN_TOLERANCE, 10 * stored.float32_errors[key])
        compare(found[head], stored.values, key, tolerance)


def test_logits_with_batch_statistics(network):
    stored, model, variables = network
    sizes = [int(key.rsplit("_")[-1]) for key in stored.values if key.startswith("train_logits_")]
    compare_trained(stored, model, variables, min(sizes))


@pytest.mark.slow
@pytest.mark.parametrize("network", ["inception_v3"], indirect=True)
def test_auxiliary_head_of_inception(network):
    compare_trained(*network, registry.model_spec("inception_v3").smallest_auxiliary)


@pytest.mark.slow
@pytest.mark.parametrize("network", FULL_SIZE, indirect=True)
def test_logits_at_full_size(shared, network):
    stored, model, variables = network
    with np.load(shared / "golden" / f"{stored.name}.npz") as golden:
        shapes = [
            f"({', '.join(map(str, s))}{',' * (len(s) == 1)})" for s in stored.shapes.values()
        ]
        assert golden["keys"].tolist() == list(stored.shapes)
        assert golden["shapes"].tolist() == shapes
        sizes = (299, 224) if stored.name == "inception_v3" else (224, 161)
        forward = jax.jit(lambda variables, images: model.apply(variables, images)[0])
        for size in sizes:
            logits = forward(variables, reference.drawn_input(size))
            assert reference.relative_error(logits, golden[f"logits_{size}"]) <= TOLERANCE
