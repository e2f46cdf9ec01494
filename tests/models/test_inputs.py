"""What the weights expect of an image, by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from medtl_jax.models import inputs

IMAGE = np.array([[[0, 127, 255], [255, 0, 1]]], np.uint8)[None]
EXPECTED = {
    # (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225], torchvision's own description.
    "IMAGENET": [
        [-0.485 / 0.229, (127 / 255 - 0.456) / 0.224, 0.594 / 0.225],
        [0.515 / 0.229, -0.456 / 0.224, (1 / 255 - 0.406) / 0.225],
    ],
    "CENTRED": [[-1.0, -0.5 / 127.5, 1.0], [1.0, -1.0, -126.5 / 127.5]],
    "LITE": [[-127 / 128, 0.0, 1.0], [1.0, -127 / 128, -126 / 128]],
    "CAFFE": [[-123.68, 127 - 116.779, 255 - 103.939], [255 - 123.68, -116.779, 1 - 103.939]],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_normalize_by_hand(name):
    found = inputs.normalize(jnp.asarray(IMAGE), getattr(inputs, name))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [[EXPECTED[name]]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_grey_image_is_its_replica_in_three_channels(name):
    spec = getattr(inputs, name)
    grey = jnp.array([[[[0], [127], [255]]]], jnp.uint8)
    found = inputs.normalize(grey, spec)
    assert found.shape == (1, 1, 3, 3)
    np.testing.assert_array_equal(found, inputs.normalize(jnp.repeat(grey, 3, axis=3), spec))


def test_one_channel_of_the_weights_keeps_one_channel():
    spec = inputs.InputSpec((100.0,), (50.0,))
    found = inputs.normalize(jnp.array([[[[0], [125]]]], jnp.uint8), spec)
    assert spec.channels == 1
    np.testing.assert_array_equal(found, [[[[-2.0], [0.5]]]])


@pytest.mark.parametrize("channels", [2, 4])
def test_another_number_of_channels_is_refused(channels):
    with pytest.raises(ValueError, match=f"an image of {channels} channels for 3 of the model"):
        inputs.normalize(jnp.zeros((1, 2, 2, channels), jnp.uint8), inputs.IMAGENET)


def test_a_spec_of_several_channels_refuses_fewer_that_are_not_grey():
    wide = dataclasses.replace(inputs.IMAGENET, mean=(1.0,) * 5, std=(2.0,) * 5)
    with pytest.raises(ValueError, match="an image of 3 channels for 5 of the model"):
        inputs.normalize(jnp.zeros((1, 2, 2, 3), jnp.uint8), wide)


# ---- contrast ----------------------------------------------------------------------------------

GREY = np.random.default_rng(0).binomial(60, 0.4, (2, 20, 14, 1)).astype(np.uint8)


def test_equalisation_comes_before_the_normalisation():
    """0, 1 and 3 of the 4 pixels are darker: 0, 1/3 and all of the 255."""
    spec = inputs.InputSpec((100.0,), (50.0,), contrast="equalize")
    image = jnp.array([[[[10], [20]], [[20], [30]]]], jnp.uint8)
    found = inputs.normalize(image, spec)[..., 0]
    np.testing.assert_allclose(found, [[[-2.0, -0.3], [-0.3, 3.1]]], rtol=1e-5)


@pytest.mark.parametrize("contrast", inputs.CONTRASTS)
def test_each_image_is_enhanced_alone_and_bytes_as_floats(contrast):
    found = np.asarray(inputs.enhance(jnp.asarray(GREY), contrast))
    one = inputs.enhance(jnp.asarray(GREY[:1], jnp.float32), contrast)
    np.testing.assert_allclose(found[:1], one, atol=1e-3)
    assert found.shape == GREY.shape and 0 <= found.min() < found.max() <= 255
    assert (found == GREY).all() == (contrast == "none")
