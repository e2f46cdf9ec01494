"""Writes Keras' .h5 files: helpers of the tests here."""

import io

import h5py
import numpy as np

KERNEL = np.arange(24, dtype=np.float32).reshape(2, 2, 2, 3)
BIAS = np.array([1, 2, 3], np.float32)


def h5(fill, **options):
    """The bytes of an HDF5 file that `fill(file)` has filled."""
    stream = io.BytesIO()
    with h5py.File(stream, "w", **options) as file:
        fill(file)
    return stream.getvalue()


def keras_legacy(root, layers):
    """Writes layers {layer: {weight name: array}} in the form of Keras 1 and 2."""
    root.attrs["layer_names"] = [name.encode() for name in layers]
    for layer, weights in layers.items():
        group = root.create_group(layer)
        group.attrs["weight_names"] = [name.encode() for name in weights]
        for name, array in weights.items():
            group[name] = array


LAYERS = {
    "input_1": {},
    "block1_conv1": {
        "block1_conv1/kernel:0": KERNEL,
        "block1_conv1/bias:0": BIAS,
    },
    "fire2/squeeze1x1": {"fire2/squeeze1x1_W_1:0": KERNEL, "fire2/squeeze1x1_b_1:0": BIAS},
    "bn": {"bn/gamma:0": BIAS, "bn/moving_variance:0": BIAS},
}
