"""What HDF5 can hold and Keras does not write: each is refused before it is read."""

import h5py
import numpy as np
import pytest
from keras_bytes import BIAS, LAYERS, h5, keras_legacy

from medtl_jax.weights import hdf5_child

LIMIT = 2**20


def link(target):
    return lambda file: file.__setitem__("w", target)


def virtual(file):
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (3,))
    file.create_virtual_dataset("w", layout)


def cycle(file):
    file["a/b/w"] = BIAS
    file["a/b/c"] = file["a"]


def unlisted(file):
    keras_legacy(file, LAYERS)
    file["bn/bn/beta:0"] = BIAS


def listed(file):
    keras_legacy(file, LAYERS)
    del file["bn/bn/gamma:0"]


def listed_layer(file):
    keras_legacy(file, LAYERS)
    del file["bn"]


def listed_twice(file):
    keras_legacy(file, {"a": {"a/kernel:0": BIAS}})
    file.attrs["layer_names"] = [b"a", b"a"]


def numbers_for_names(file):
    keras_legacy(file, LAYERS)
    file.attrs["layer_names"] = [1, 2]


def tied_often(file):
    file["w0"] = np.zeros(10_000, "f4")
    for index in range(1, 30):
        file[f"w{index}"] = file["w0"]


def dataset(*args, **options):
    return lambda file: file.create_dataset("w", *args, **options)


HOSTILE = {
    "external link": (link(h5py.ExternalLink("/etc/passwd", "/x")), "'w' is a ExternalLink"),
    "soft link": (link(h5py.SoftLink("/a")), "'w' is a SoftLink"),
    "external storage": (
        dataset((3,), "f4", external=[("/etc/passwd", 0, 12)]),
        "virtual or stored in another file",
    ),
    "virtual": (virtual, "virtual or stored in another file"),
    "texts": (dataset(data=["a"]), "has dtype object"),
    "references": (dataset((1,), h5py.ref_dtype), "has dtype object"),
    "records": (dataset((1,), [("a", "f4")]), "no plain number"),
    "arrays": (dataset((1,), "(3,)f4"), "no plain number"),
    "complex": (dataset((1,), "c8"), "has dtype complex64"),
    "opaque": (dataset((1,), "V8"), "no plain number"),
    "null": (dataset(dtype="f4"), "is empty"),
    "empty": (dataset((0,), "f4"), "is empty"),
    "filter": (dataset((3,), "i4", data=[1, 2, 3], scaleoffset=0), "needs the HDF5 filter 6"),
    "named type": (lambda file: file.__setitem__("w", np.dtype("f4")), "neither a group nor"),
    "cycle": (cycle, "groups that hold each other"),
    "never written": (dataset((2**30,), "f4"), "claims 4,294,967,296 bytes, 0 are there"),
    "no chunk": (dataset((2**30,), "f4", chunks=(2**10,)), "too large, or none"),
    "large chunk": (dataset((2**20,), "f4", chunks=(2**20,)), "too large, or none"),
    "unlisted": (unlisted, "do not fit its tensors ('bn/bn/beta:0')"),
    "listed weight": (listed, "do not fit its tensors ('bn/bn/gamma:0')"),
    "listed layer": (listed_layer, "the layer 'bn' is listed but not there"),
    "listed twice": (listed_twice, "do not fit its tensors ('a name')"),
    "names": (numbers_for_names, "'layer_names' is not a list of names"),
    "tied": (tied_often, "would take more than 1,048,576 bytes"),
}


@pytest.mark.parametrize("what", list(HOSTILE))
def test_what_keras_does_not_write_is_refused(what):
    fill, words = HOSTILE[what]
    with pytest.raises(hdf5_child.RefusedError) as caught:
        hdf5_child.read_arrays(h5(fill), LIMIT)
    assert words in str(caught.value)


def test_a_gigantic_claim_of_a_few_chunks_is_refused():
    def fill(file):
        file.create_dataset("w", (2**30,), "f4", chunks=(16,))[:16] = 1

    data = h5(fill)
    assert len(data) < 10_000
    with pytest.raises(hdf5_child.RefusedError, match="would take more than"):
        hdf5_child.read_arrays(data, LIMIT)
