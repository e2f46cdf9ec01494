"""Models by name, their initialisation and the input that their weights expect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medtl_jax.errors import UserError
from medtl_jax.models import registry


def test_every_listed_model_can_be_made():
    names = registry.list_models()
    assert "efficientnet_lite0" in names and list(names) == sorted(names)
    for name in names:
        model, spec = registry.create_model(name, 2)
        shapes = registry.variable_shapes(model, spec.smallest_input)
        assert spec.name == name
        assert set(shapes["params"]) == {*spec.stages, spec.head}
        assert shapes["params"][spec.head]["kernel"].shape[-1] == 2


def test_an_unknown_name_is_one_line():
    with pytest.raises(UserError, match=r"model.name='resnet' is not a model; known: .*lite0"):
        registry.create_model("resnet", 2)


def test_momentum_is_the_weights_own_unless_it_is_given():
    assert registry.create_model("efficientnet_lite0", 2)[0].momentum == 0.99
    assert registry.create_model("efficientnet_lite0", 2, momentum=0.5)[0].momentum == 0.5


def test_initialize_only_a_part_gives_the_same_values(tiny_model):
    model, _ = tiny_model()
    whole = registry.initialize(model, 16, jax.random.key(3))
    head = registry.initialize(model, 16, jax.random.key(3), only=lambda name: name == "head")
    assert set(head["params"]) == {"head"} and head["batch_stats"] == {}
    np.testing.assert_array_equal(
        head["params"]["head"]["kernel"], whole["params"]["head"]["kernel"]
    )
    assert 0.005 < float(whole["params"]["head"]["kernel"].std()) < 0.02


def test_normalize_by_hand(tiny_model):
    _, spec = tiny_model()
    image = jnp.array([[0, 127, 255]], jnp.uint8).reshape(1, 1, 1, 3)
    found = registry.normalize(image, spec)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found.ravel(), [-127 / 128, 0.0, 1.0], rtol=1e-6)


def test_a_grey_image_becomes_three_equal_channels(tiny_model):
    _, spec = tiny_model()
    grey = jnp.array([[[[0], [255]]]], jnp.uint8)
    found = registry.normalize(grey, spec)
    assert found.shape == (1, 1, 2, 3)
    np.testing.assert_allclose(found[0, 0], [[-127 / 128] * 3, [1.0] * 3], rtol=1e-6)
