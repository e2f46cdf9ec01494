"""Squeeze-excite, and EfficientNet-Lite: its shapes, and torch's logits on the real weights."""

import hashlib
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image
from reference import GOLDEN, load_layers, relative_error

from medtl_jax.models import registry
from medtl_jax.models.inputs import normalize
from medtl_jax.models.mobile import SqueezeExcite
from medtl_jax.weights.pretrained import fill, open_pretrained
from medtl_jax.weights.sources import find_weights

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def lite0():
    return registry.create_model("efficientnet_lite0", 1000)


@pytest.fixture(scope="module")
def forward(lite0):
    """One compiled program for all the comparisons: `(variables, x [2, s, s, 3]) -> logits`."""
    return jax.jit(lambda variables, x: lite0[0].apply(variables, x)[0])


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


@pytest.mark.parametrize("case", load_layers("squeeze_excitation"), ids=lambda case: case.name)
def test_squeeze_excite_equals_torch(case):
    arrays = {name: jnp.asarray(array) for name, array in case.arrays.items()}
    module = SqueezeExcite(arrays["kernel1"].shape[-1], nn.silu, jnp.float32)
    inputs = ("image", "kernel1", "bias1", "kernel2", "bias2")

    def apply(image, kernel1, bias1, kernel2, bias2):
        reduce, expand = {"kernel": kernel1, "bias": bias1}, {"kernel": kernel2, "bias": bias2}
        return module.apply({"params": {"reduce": reduce, "expand": expand}}, image)

    @jax.jit
    def differentiate(cotangent, *arguments):
        y, pullback = jax.vjp(apply, *arguments)
        return y, pullback(cotangent)

    y, gradients = differentiate(arrays["cotangent"], *(arrays[name] for name in inputs))
    np.testing.assert_allclose(y, arrays["output"], rtol=1e-5, atol=1e-6)
    for name, found in zip(inputs, gradients, strict=True):
        np.testing.assert_allclose(found, arrays[f"gradient_{name}"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 161])
def test_logits_on_photographs_equal_torch(lite0, forward, size):
    # The reference was made with torch 2.13 (CPU), package efficientnet_lite_pytorch 0.1.0 and
    # the ImageNet weights that `imagenet` names, in eval mode, on china.jpg and flower.jpg of
    # scikit-learn, resized with Pillow's bicubic filter, as (x - 127) / 128. The package's own
    # default fixes the padding of every layer for 224 pixels; `image_size=None` made it follow
    # the input, as TensorFlow does.
    model, spec = lite0
    golden = np.load(GOLDEN / "efficientnet_lite0_photos.npz")
    photos = sklearn.datasets.load_sample_images().images
    x = np.stack(
        [Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC) for p in photos]
    )
    if hashlib.sha256(x.tobytes()).hexdigest() != str(golden[f"pixels_sha256_{size}"]):
        pytest.skip("this version of Pillow decodes or resizes the photographs differently")
    weights = open_pretrained(spec, find_weights(spec.name, "imagenet"))
    variables, _ = fill(registry.variable_shapes(model, size), weights)
    found = forward(variables, normalize(jnp.asarray(x), weights.input))
    wanted = golden[f"logits_{size}_china_flower"]
    assert relative_error(found, wanted) <= TOLERANCE
    np.testing.assert_array_equal(np.argmax(found, -1), wanted.argmax(-1))
    assert int(np.argmax(found[0])) == 442  # bell cote: the photograph shows a temple
