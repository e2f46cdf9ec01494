"""LeNet-5 against a forward pass in SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from medtl_jax.models import registry
from medtl_jax.models.classic import scaled_tanh


@pytest.fixture(scope="module")
def lenet():
    model, _ = registry.create_model("lenet5", 10, in_chans=1)
    shapes = registry.variable_shapes(model, 28)["params"]
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        return rng.standard_normal(leaf.shape).astype(np.float32) / np.float32(np.sqrt(fan_in))

    return model, jax.tree.map(draw, shapes)


def squash(x):
    return 1.7159 * np.tanh(2 / 3 * x)


def convolve(x, layer):
    """Cross-correlation without padding: `[h, w, c]` -> `[h - 4, w - 4, o]`."""
    kernel, bias = (np.asarray(layer["conv"]["conv"][k], np.float64) for k in ("kernel", "bias"))
    maps = [
        sum(
            scipy.signal.correlate2d(x[..., c], kernel[..., c, o], "valid")
            for c in range(x.shape[-1])
        )
        for o in range(kernel.shape[-1])
    ]
    return squash(np.stack(maps, axis=-1) + bias)


def halve(x):
    return (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4


def lenet_by_hand(params, image):
    c1 = convolve(np.pad(image, ((2, 2), (2, 2), (0, 0))), params["stem"])
    c3 = convolve(halve(c1), params["stage1"])
    x = halve(c3).ravel()
    for layer in ("fc1", "fc2"):
        x = squash(x @ params["features"][layer]["kernel"] + params["features"][layer]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"], c1, c3, x


def test_lenet_equals_scipy(lenet):
    model, params = lenet
    images = np.random.default_rng(1).standard_normal((2, 28, 28, 1))
    logits, out = model.apply({"params": params}, jnp.asarray(images, jnp.float32))
    assert {name: x.shape[1:] for name, x in out.items()} == {
        "stem": (28, 28, 6),
        "stage1": (10, 10, 16),
        "features": (84,),
    }
    for i, image in enumerate(images):
        expected = lenet_by_hand(params, image)
        found = (logits, out["stem"], out["stage1"], out["features"])
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)


def test_layers_of_lenet_have_the_counts_of_the_original(lenet):
    _, params = lenet
    counts = {
        "/".join(path): sum(leaf.size for leaf in jax.tree.leaves(tree))
        for path, tree in {
            ("C1",): params["stem"],
            ("C3",): params["stage1"],
            ("C5",): params["features"]["fc1"],
            ("F6",): params["features"]["fc2"],
            ("output",): params["head"],
        }.items()
    }
    # C3 sees all six maps: 16 (6 25 + 1). C5 reads 400 values.
    assert counts == {"C1": 156, "C3": 2416, "C5": 48120, "F6": 10164, "output": 850}
    assert sum(counts.values()) == 61_706


def test_the_squashing_function_maps_one_to_one():
    # LeCun et al. 1998, appendix A: the parameters are chosen so that f(1) = 1 and f(-1) = -1.
    np.testing.assert_allclose(scaled_tanh(jnp.array([-1.0, 0.0, 1.0])), [-1, 0, 1], atol=1e-4)
