"""Keras' .h5 weights: every version's spelling, and a reading process that may crash or hang."""

import json
import os
import pathlib
import struct
import subprocess
import sys

import h5py
import numpy as np
import pytest
from keras_bytes import BIAS, KERNEL, LAYERS, h5, keras_legacy
from torch_bytes import read, refusal

from medtl_jax.weights import checks, hdf5, hdf5_child
from medtl_jax.weights.files import read_weights
from medtl_jax.weights.hdf5 import keras_name

LIMIT = 2**20


NAMES = [
    "block1_conv1/kernel",
    "block1_conv1/bias",
    "fire2/squeeze1x1/kernel",
    "fire2/squeeze1x1/bias",
    "bn/gamma",
    "bn/moving_variance",
]


# --- honest files ---------------------------------------------------------------------------


def test_a_real_file(shared):
    path = shared / "weights" / "squeezenet_weights_tf_dim_ordering_tf_kernels.h5"
    file = read_weights(path)
    assert (file.format, file.metadata) == ("keras-h5", {})
    assert file.sha256.startswith("308d1afdb450bd28")
    assert list(file.tensors)[:4] == [
        "conv1/kernel",
        "conv1/bias",
        "fire2/squeeze1x1/kernel",
        "fire2/squeeze1x1/bias",
    ]
    # SqueezeNet 1.1 has 1,235,496 parameters (torchvision's squeezenet1_1) in 26 convolutions.
    assert len(file.tensors) == 52
    assert sum(array.size for array in file.tensors.values()) == 1_235_496
    assert file.tensors["conv1/kernel"].shape == (3, 3, 3, 64)


def test_legacy_weights_in_the_order_of_the_layers(tmp_path):
    tensors = read(tmp_path, h5(lambda file: keras_legacy(file, LAYERS))).tensors
    assert list(tensors) == NAMES
    np.testing.assert_array_equal(tensors["block1_conv1/kernel"], KERNEL)
    np.testing.assert_array_equal(tensors["fire2/squeeze1x1/bias"], BIAS)
    assert all(a.dtype == np.float32 and a.flags.writeable for a in tensors.values())


def test_a_whole_model_without_its_optimizer(tmp_path):
    def fill(file):
        file.attrs["model_config"] = json.dumps({"class_name": "Model"})
        keras_legacy(file.create_group("model_weights"), LAYERS)
        # An empty group that TensorFlow 2 writes beside the layers.
        top = file["model_weights"].create_group("top_level_model_weights")
        top.attrs["weight_names"] = np.array([])
        keras_legacy(file.create_group("optimizer_weights"), {"adam": {"m:0": BIAS}})

    assert list(read(tmp_path, h5(fill)).tensors) == NAMES


def test_weights_of_the_model_itself_are_kept(tmp_path):
    def fill(file):
        keras_legacy(file, {"dense": {"dense/kernel:0": BIAS}})
        top = file.create_group("top_level_model_weights")
        top.attrs["weight_names"] = [b"scale:0"]
        top["scale:0"] = BIAS

    assert list(read(tmp_path, h5(fill)).tensors) == [
        "dense/kernel",
        "top_level_model_weights/scale",
    ]


def keras_3(file, title="c1"):
    """The layout that Keras 3.15 writes: groups called by class, the layer's name an attribute."""
    layers = {"conv2d": (title, [KERNEL, BIAS]), "conv2d_1": ("c2", [KERNEL])}
    layers["batch_normalization"] = ("bn1", [BIAS, 2 * BIAS, 3 * BIAS, 4 * BIAS])
    layers["batch_normalization_1"] = ("bn2", [BIAS, BIAS, BIAS])
    layers["flatten"] = ("flatten", [])
    for group, (name, arrays) in layers.items():
        variables = file.create_group(f"layers/{group}/vars")
        variables.attrs["name"] = name
        for number, array in enumerate(arrays):
            variables[str(number)] = array
    file["optimizer/vars/0"] = np.array(3, np.int64)
    file.create_group("vars").attrs["name"] = "sequential"


def test_keras_3_by_the_names_of_its_layers(tmp_path):
    tensors = read(tmp_path, h5(keras_3)).tensors
    expected = {
        "c1/kernel": KERNEL,
        "c1/bias": BIAS,
        "c2/kernel": KERNEL,
        "bn1/gamma": BIAS,
        "bn1/beta": 2 * BIAS,
        "bn1/moving_mean": 3 * BIAS,
        "bn1/moving_variance": 4 * BIAS,
        # Three vectors may be any three of the four.
        "bn2/0": BIAS,
        "bn2/1": BIAS,
        "bn2/2": BIAS,
    }
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], array)


@pytest.mark.parametrize("title", ["c2", ""])
def test_keras_3_by_path_where_names_repeat_or_are_absent(tmp_path, title):
    tensors = read(tmp_path, h5(lambda file: keras_3(file, title))).tensors
    assert "layers/conv2d/vars/0" in tensors and len(tensors) == 10
    np.testing.assert_array_equal(tensors["layers/conv2d/vars/1"], BIAS)
    assert all(name.startswith("layers/") for name in tensors)


def test_long_lists_of_names_are_put_together(tmp_path):
    # Keras cuts a list that exceeds HDF5's 64 KB into layer_names0, layer_names1, ...
    def fill(file):
        keras_legacy(file, LAYERS)
        del file.attrs["layer_names"]
        file.attrs["layer_names0"] = [b"input_1", b"block1_conv1"]
        file.attrs["layer_names1"] = [b"fire2/squeeze1x1", b"bn"]

    assert list(read(tmp_path, h5(fill)).tensors) == NAMES


@pytest.mark.parametrize("text", [h5py.string_dtype(), "S40"])
def test_texts_of_either_kind(tmp_path, text):
    def fill(file):
        keras_legacy(file, {"a": {"a/kernel:0": BIAS}})
        file.attrs["layer_names"] = np.array(["a"], text)

    assert list(read(tmp_path, h5(fill)).tensors) == ["a/kernel"]


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "gzip"},
        {"compression": "gzip", "shuffle": True, "fletcher32": True},
        {"compression": "lzf"},
        {"chunks": (3,)},
    ],
)
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i8", "|u1", "?"])
def test_filters_and_dtypes(options, dtype):
    values = (np.arange(6) % 2).astype(dtype)
    data = h5(lambda file: file.create_dataset("w", data=values, **options))
    names, (array,) = hdf5_child.read_arrays(data, LIMIT)
    assert names == [("", "w")]
    np.testing.assert_array_equal(array, values)
    assert array.dtype == np.dtype(dtype).newbyteorder("=") and array.dtype.isnative


@pytest.mark.parametrize(
    ("layer", "weight", "expected"),
    [
        ("block1_conv1", "block1_conv1/kernel:0", "block1_conv1/kernel"),
        ("block1_conv1", "block1_conv1/block1_conv1/kernel:0", "block1_conv1/kernel"),
        ("conv1", "conv1_W:0", "conv1/kernel"),
        ("conv1", "conv1_b_12:0", "conv1/bias"),
        ("conv1_b", "conv1_b_W", "conv1_b/kernel"),
        ("bn1", "bn1_gamma:0", "bn1/gamma"),
        ("bn1", "bn1_beta_1:0", "bn1/beta"),
        ("bn1", "bn1_running_mean:0", "bn1/moving_mean"),
        ("bn1", "bn1_running_std:0", "bn1/moving_variance"),
        ("bn1", "bn1/moving_mean:0", "bn1/moving_mean"),
        ("c1", "sequential/c1/kernel", "c1/kernel"),
        ("resnet", "conv1/kernel:0", "resnet/conv1/kernel"),
        ("dense", "kernel", "dense/kernel"),
        ("a.b", "axb_W", "a.b/axb_W"),
    ],
)
def test_names(layer, weight, expected):
    assert keras_name(layer, f"{layer}/{weight}") == expected


# --- a reading process that refuses or misbehaves --------------------------------------------


def test_refusals_through_the_process(tmp_path):
    assert "links are not followed" in refusal(
        tmp_path, h5(lambda file: file.__setitem__("w", h5py.ExternalLink("/etc/passwd", "/x")))
    )
    nan = h5(lambda file: file.create_dataset("w", data=np.array([1, np.nan], "f4")))
    assert "has NaN or infinite values" in refusal(tmp_path, nan)
    whole = h5(lambda file: keras_legacy(file, LAYERS))
    assert "damaged" in refusal(tmp_path, whole[: len(whole) // 2])
    twice = {"a": {"a/kernel:0": BIAS, "a_W": BIAS}}
    assert "'a/kernel' appears twice" in refusal(
        tmp_path, h5(lambda file: keras_legacy(file, twice))
    )


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os; os.abort()", "the process that reads it ended with -6"),
        ("import sys; sys.exit(1)", "the process that reads it ended with 1"),
        ("import time; time.sleep(60)", "did not finish within 1 s"),
        ("print('junk')", "header claims"),
        ("", "truncated inside its header"),
        ("import sys; print('no\\n\\x1b[31m'); sys.exit(3)", "no  [31m"),
        ("import sys; sys.stdout.write('x' * 10**6); sys.exit(3)", "xxx"),
    ],
)
def test_any_end_of_the_process_is_one_line(tmp_path, monkeypatch, program, words):
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(program)
    monkeypatch.setattr(hdf5_child, "__file__", str(stand_in))
    monkeypatch.setattr(hdf5, "MAX_SECONDS", 1)
    assert words in refusal(tmp_path, h5(lambda file: file.create_dataset("w", data=BIAS)))


@pytest.mark.skipif(sys.platform != "linux", reason="memory limits hold on Linux")
def test_the_process_cannot_take_more_memory_than_allowed():
    code = (
        f"import sys; sys.path.insert(0, {str(pathlib.Path(hdf5_child.__file__).parent)!r});"
        "import hdf5_child; hdf5_child._limit_resources(2**30, 10); bytearray(2**31)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MemoryError" in done.stderr


# --- fuzzing --------------------------------------------------------------------------------

# Reads mutants of a file in one process: a line for each, so that a crash or a loop without end
# tells which mutant it was.
FUZZ = """
import pathlib, resource, signal, sys
sys.path.insert(0, sys.argv[1])
import hdf5_child
resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for number in range(int(sys.argv[3]), int(sys.argv[4])):
    data = pathlib.Path(sys.argv[2], str(number)).read_bytes()
    signal.setitimer(signal.ITIMER_PROF, 1)  # of processor time; the signal ends the process
    try:
        names, arrays = hdf5_child.read_arrays(data, 2**20)
        print("read", sum(array.nbytes for array in arrays) <= 2**20, flush=True)
    except hdf5_child.RefusedError:
        print("refused True", flush=True)
    except Exception as error:
        print(type(error).__name__, not isinstance(error, MemoryError), flush=True)
"""


def mutants(whole, count):
    """Flips, truncations, splices and 4- or 8-byte lengths put into `whole`."""
    random = np.random.default_rng(20240607)
    lengths = [0, 1, 2**31 - 1, 2**32 - 1]
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(random.integers(1, 5)):
            place = int(random.integers(len(data)))
            match int(random.integers(4)):
                case 0:
                    data[place] ^= 1 << int(random.integers(8))
                case 1:
                    data[place : place + 4] = struct.pack("<L", random.choice(lengths))
                case 2:
                    start = int(random.integers(len(whole)))
                    data[place : place + 16] = whole[start : start + 16]
                case 3 if random.integers(4) == 0:
                    del data[place + 1 :]
        yield bytes(data)


@pytest.mark.skipif(os.name != "posix", reason="the test bounds its process with resource")
def test_damage_gives_weights_or_one_refusal(tmp_path, monkeypatch):
    def fill(file):
        keras_legacy(file, {"a": {"a/kernel:0": KERNEL}, "b": {"b_W": BIAS}})
        file["b"].attrs["weight_names"] = np.array(["b_W", "c"], h5py.string_dtype())
        file["b"].create_dataset("c", data=BIAS, compression="gzip", shuffle=True)

    # The older form of the metadata has no checksums: damage reaches further into the library.
    whole = h5(fill, libver="earliest")
    # HDF5 2.0 loops for ever on number 401.
    count, start, outcomes, crashes = 410, 0, [], []
    for number, data in enumerate(mutants(whole, count)):
        (tmp_path / str(number)).write_bytes(data)
    folder = str(pathlib.Path(hdf5_child.__file__).parent)
    while start < count:
        command = [sys.executable, "-c", FUZZ, folder, str(tmp_path), str(start), str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        lines = done.stdout.splitlines()
        outcomes += lines
        start += len(lines)
        if start < count:
            crashes.append(start)
            start += 1
    assert all(line.endswith(" True") for line in outcomes)
    kinds = {line.split()[0] for line in outcomes}
    assert {"read", "refused"} < kinds
    # What takes the process down is a refusal of the parent's.
    monkeypatch.setattr(hdf5, "MAX_SECONDS", 1)
    for number in crashes[:1]:
        refusal(tmp_path, (tmp_path / str(number)).read_bytes())


def test_the_limit_follows_the_file():
    assert checks.unpacked_limit(100) == 16 * 2**20
    assert checks.unpacked_limit(2**20) == 32 * 2**20
    assert checks.unpacked_limit(2**30) == 8 * 2**30
