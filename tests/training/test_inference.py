"""Prediction: one row an image, in order, whatever the batch and the devices; and the mesh."""

import jax
import numpy as np
import pytest

from medtl_jax.errors import UserError
from medtl_jax.models.inputs import normalize
from medtl_jax.training.devices import check_batch_size, data_mesh
from medtl_jax.training.inference import is_finite, make_predict


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (16, 16, 16, 1), np.uint8)


@pytest.fixture(scope="module")
def network(tiny_model):
    return tiny_model(3)


def test_rows_are_in_order_whatever_the_batch_and_the_devices(network, tiny_variables, images):
    model, spec = network
    x = normalize(images[:13], spec.input)
    wanted = np.asarray(jax.jit(lambda v, x: model.apply(v, x)[0])(tiny_variables, x))
    assert len(np.unique(wanted[:, 0])) == 13
    for devices, batch_size in ((4, 8), (1, 5), (4, 16)):
        predict = make_predict(model, spec, data_mesh(devices), batch_size)
        found = predict(tiny_variables, images[:13])
        assert found.shape == (13, 3) and found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-7)


def test_padding_changes_no_bit(network, tiny_variables, images):
    predict = make_predict(*network, data_mesh(4), 8)
    whole = predict(tiny_variables, images)
    np.testing.assert_array_equal(predict(tiny_variables, images[:13]), whole[:13])
    np.testing.assert_array_equal(predict(tiny_variables, jax.numpy.asarray(images)), whole)


def test_what_is_made_of_each_batch_is_joined(network, tiny_variables, images):
    predict = make_predict(*network, data_mesh(4), 8)
    whole, sizes = predict(tiny_variables, images[:13]), []

    def largest(logits):
        sizes.append(len(logits))
        return logits.argmax(axis=-1).astype(np.uint8)

    found = predict(tiny_variables, images[:13], largest)
    assert sizes == [8, 8] and found.dtype == np.uint8 and found.shape == (13,)
    np.testing.assert_array_equal(found, whole.argmax(axis=-1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_seen(value):
    values = np.zeros((3, 2, 2), np.float16)
    assert is_finite(values)
    values[2, 1, 0] = value
    assert not is_finite(values)


def test_a_mesh_takes_all_devices_or_the_first():
    assert data_mesh().mesh.devices.tolist() == jax.devices()
    assert data_mesh(2).mesh.devices.tolist() == jax.devices()[:2]
    assert not data_mesh().scans  # on CPU


@pytest.mark.parametrize("count", [5, -1])
def test_devices_that_are_not_there_are_refused(count):
    with pytest.raises(UserError, match=f"train.devices={count}, but this machine has 4; 0 takes"):
        data_mesh(count)


@pytest.mark.parametrize("size", [0, -4, 6])
def test_a_batch_must_divide_over_the_devices(size):
    with pytest.raises(
        UserError, match=f"data.batch_size={size} must be a positive multiple of the 4"
    ):
        check_batch_size("data.batch_size", size, data_mesh())
    check_batch_size("data.batch_size", 8, data_mesh())
