"""EfficientNet-Lite: its table, its shapes, and torch's logits on the real weights."""

import hashlib
import math
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from medtl_jax.models import registry
from medtl_jax.weights.merge import load_pretrained, merge_weights

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "efficientnet_lite0_photos.npz"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def lite0():
    return registry.create_model("efficientnet_lite0", 1000)


@pytest.fixture(scope="module")
def forward(lite0):
    """One compiled program for all the comparisons: `(variables, x [2, s, s, 3]) -> logits`."""
    return jax.jit(lambda variables, x: lite0[0].apply(variables, x)[0])


def test_parameter_count_is_the_published_one(lite0):
    shapes = registry.variable_shapes(lite0[0], 128)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"])) == 4_652_008
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("size", [128, 33])
def test_intermediates_have_fixed_names_and_shapes(lite0, size):
    model, _ = lite0
    variables = registry.variable_shapes(model, size)
    image = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    logits, out = jax.eval_shape(model.apply, variables, image)
    widths = {"stem": 32, "stage1": 16, "stage2": 24, "stage3": 40, "stage4": 80}
    widths |= {"stage5": 112, "stage6": 192, "stage7": 320}
    halvings = {"stem": 1, "stage1": 1, "stage2": 2, "stage3": 3}
    halvings |= {"stage4": 4, "stage5": 4, "stage6": 5, "stage7": 5}
    expected = {}
    for name, width in widths.items():
        side = math.ceil(size / 2 ** halvings[name])
        expected[name] = (2, side, side, width)
    assert {name: leaf.shape for name, leaf in out.items()} == {**expected, "features": (2, 1280)}
    assert logits.shape == (2, 1000)


def test_stages_of_the_spec_are_those_of_the_parameters(lite0):
    model, spec = lite0
    variables = registry.variable_shapes(model, 64)
    assert set(variables["params"]) == {*spec.stages, spec.head}
    assert set(variables["batch_stats"]) == set(spec.stages)


def test_another_domain_is_refused(lite0):
    model, _ = lite0
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    with pytest.raises(ValueError, match="domain 1: this model keeps"):
        jax.eval_shape(
            lambda v, x: model.apply(v, x, domain=1), registry.variable_shapes(model, 32), image
        )


def test_frozen_stages_keep_their_statistics_and_the_others_move(tiny_model):
    model, spec = tiny_model(momentum=0.5)
    variables = registry.initialize(model, 16, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    frozen = ("stem", "stage2")

    @jax.jit
    def train(variables, x):
        rngs = {"dropout": jax.random.key(2)}
        return model.apply(variables, x, True, frozen, rngs=rngs, mutable=["batch_stats"])

    _, moved = train(variables, x)
    for stage in spec.stages:
        before = jax.tree.leaves(variables["batch_stats"][stage])
        after = jax.tree.leaves(moved["batch_stats"][stage])
        same = [bool((a == b).all()) for a, b in zip(before, after, strict=True)]
        assert all(same) if stage in frozen else not any(same), stage


def test_drop_path_and_dropout_act_in_training_alone(tiny_model):
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


def relative_error(found, reference):
    return float(np.linalg.norm(np.asarray(found) - reference) / np.linalg.norm(reference))


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 161])
def test_logits_on_photographs_equal_torch(lite0, forward, size):
    # The reference was made with torch 2.13 (CPU), package efficientnet_lite_pytorch 0.1.0 and
    # the ImageNet weights that `imagenet` names, in eval mode, on china.jpg and flower.jpg of
    # scikit-learn, resized with Pillow's bicubic filter, as (x - 127) / 128. The package's own
    # default fixes the padding of every layer for 224 pixels; `image_size=None` made it follow
    # the input, as TensorFlow does.
    model, spec = lite0
    golden = np.load(GOLDEN)
    photos = sklearn.datasets.load_sample_images().images
    x = np.stack(
        [Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC) for p in photos]
    )
    if hashlib.sha256(x.tobytes()).hexdigest() != str(golden[f"pixels_sha256_{size}"]):
        pytest.skip("this version of Pillow decodes or resizes the photographs differently")
    variables, _, _ = load_pretrained(registry.variable_shapes(model, size), spec.name, "imagenet")
    found = forward(variables, registry.normalize(jnp.asarray(x), spec))
    wanted = golden[f"logits_{size}_china_flower"]
    assert relative_error(found, wanted) <= TOLERANCE
    np.testing.assert_array_equal(np.argmax(found, -1), wanted.argmax(-1))
    assert int(np.argmax(found[0])) == 442  # bell cote: the photograph shows a temple


def drawn_tensor(key, shape):
    """The weights of the shared reference: a pure function of torch's key and the shape."""
    rng = np.random.default_rng([0, zlib.crc32(key.encode())])
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if leaf in ("running_mean", "bias"):
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    deviation = np.sqrt(2.0 / np.prod(shape[1:]))
    return (rng.standard_normal(shape) * deviation).astype(np.float32)


def timm_layers(table):
    """timm's (convolution, norm) of each of our layers."""
    layers = {"stem": ("conv_stem", "bn1"), "features": ("conv_head", "bn2")}
    for number, stage in enumerate(table):
        for block in range(stage.repeats):
            names = ("depthwise", "project")
            sources = (("conv_dw", "bn1"), ("conv_pw", "bn2"))
            if stage.expansion != 1:
                names = ("expand", *names)
                sources = (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"))
            for name, pair in zip(names, sources, strict=True):
                prefix = f"blocks.{number}.{block}."
                layers[f"stage{number + 1}/block{block + 1}/{name}"] = tuple(
                    prefix + part for part in pair
                )
    return layers


@pytest.mark.slow
def test_logits_on_drawn_weights_equal_timm(shared, lite0, forward):
    model, _ = lite0
    reference = np.load(shared / "golden" / "tf_efficientnet_lite0.npz")
    shapes = dict(zip(reference["keys"].tolist(), reference["shapes"].tolist(), strict=True))

    def tensor(key):
        shape = tuple(int(part) for part in shapes.pop(key).strip("(),").split(",") if part.strip())
        return drawn_tensor(key, shape)

    flat = {}
    for name, (conv, norm) in timm_layers(model.stages).items():
        flat[f"params/{name}/conv/kernel"] = tensor(f"{conv}.weight").transpose(2, 3, 1, 0)
        flat[f"params/{name}/norm/scale"] = tensor(f"{norm}.weight")
        flat[f"params/{name}/norm/bias"] = tensor(f"{norm}.bias")
        flat[f"batch_stats/{name}/norm/mean"] = tensor(f"{norm}.running_mean")
        flat[f"batch_stats/{name}/norm/var"] = tensor(f"{norm}.running_var")
    flat["params/head/kernel"] = tensor("classifier.weight").T
    flat["params/head/bias"] = tensor("classifier.bias")
    assert all(key.endswith("num_batches_tracked") for key in shapes)
    variables, _ = merge_weights(registry.variable_shapes(model, 224), flat)
    for size in (224, 161):
        x = np.random.default_rng([0, size]).standard_normal((2, 3, size, size))
        found = forward(variables, jnp.asarray(x.astype(np.float32).transpose(0, 2, 3, 1)))
        assert relative_error(found, reference[f"logits_{size}"]) <= TOLERANCE
