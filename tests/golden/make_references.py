"""Writes the references in this folder: torch's results on drawn weights.

    python tests/golden/make_references.py [--only NAME ...]

Needs torch 2.13.0 (a CPU build is enough), torchvision 0.29.0 and timm 1.0.31 with its
dependencies. Where torchvision's compiled operators do not fit torch's build, install it with
`pip install --no-deps`: the operators are then declared here, and none of them is used.

All arithmetic is float64 on float32 weights and images, and the results are rounded to float32:
a difference is then the error of the code under test alone. For each result the script prints
how far torch's own float32 is from it, which says what a test can ask for. README.md beside this
file describes the values.
"""

import argparse
import itertools
import pathlib
import sys
import zlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "models"))
import caffe
import reference


def declare_operators() -> torch.library.Library:
    """Return the library that declares what torchvision's compiled part would; keep it alive."""
    library = torch.library.Library("torchvision", "DEF")
    boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    align = "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
    align += "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor"
    signatures = {"nms": boxes, "qnms": boxes, "roi_align": align}
    for name in ("deform_conv2d", "ps_roi_align", "roi_pool", "ps_roi_pool"):
        signatures[name] = "(Tensor a) -> Tensor"
        signatures[f"_{name}_backward"] = "(Tensor a) -> Tensor"
    signatures["_roi_align_backward"] = "(Tensor a) -> Tensor"
    for name, signature in signatures.items():
        library.define(name + signature)
    return library


try:
    import torchvision
except RuntimeError:  # its compiled operators were built for another torch
    _LIBRARY = declare_operators()
    import torchvision
import timm  # noqa: E402
import timm.layers  # noqa: E402

SIZES = {"inception_v3": (96, 107)}
DEFAULT_SIZES = (64, 75)
# Inception-v3's auxiliary head needs maps of 17 x 17, which 299 pixels give.
INCEPTION_AUXILIARY_SIZE = 299
# At 96 pixels its last maps are 1 x 1: statistics of four values magnify every rounding.
TRAIN_SIZES = {"inception_v3": 107}
TRAIN_BATCH = 4
EVAL_LOGITS = 50
TRAIN_LOGITS = 20
# torchvision's order of the outputs in training.
TRAIN_OUTPUTS = {
    "googlenet": ("logits", "aux2", "aux1"),
    "inception_v3": ("logits", "aux"),
}
GRADIENT_STEP = 5
# At 64 pixels they have so many kinks (of ReLU, ReLU6, max pool) that every image lies near some.
GRADIENT_SIZES = {"vgg16_bn": 32, "mobilenet_v2": 32, "tf_efficientnet_lite0": 32}
CANDIDATES = 16
TRIALS = 5
PERTURBATION = 3e-6
STEADY = 1e-4
CONV_SIDES = ((9, 11), (12, 8))


def build(name: str) -> torch.nn.Module:
    """Return the architecture in float32 on drawn weights, without dropout or drop-path."""
    if name == reference.CAFFE_ARCHITECTURE:
        model = caffe.GoogLeNet()
    elif name.startswith("tf_"):
        model = timm.create_model(name, pretrained=False, drop_rate=0.0, drop_path_rate=0.0)
    else:
        own_init = name in ("googlenet", "inception_v3")
        settings = {"init_weights": False} if own_init else {}
        model = torchvision.models.get_model(name, weights=None, **settings)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout | torchvision.ops.StochasticDepth):
            module.p = 0.0
    drawn = {
        key: torch.from_numpy(reference.drawn_tensor(key, tuple(tensor.shape)))
        for key, tensor in model.state_dict().items()
    }
    model.load_state_dict(drawn)
    return model


def images(size: int, batch: int, like: torch.nn.Module) -> torch.Tensor:
    x = torch.from_numpy(reference.drawn_input(size, batch)).permute(0, 3, 1, 2)
    return x.contiguous().to(next(like.parameters()).dtype)


def evaluated(model: torch.nn.Module, sizes: tuple[int, int]) -> dict[str, np.ndarray]:
    model.eval()
    values = {}
    for size in sizes:
        with torch.no_grad():
            logits = model(images(size, 2, model))
        values[f"logits_{size}"] = logits[:, :EVAL_LOGITS].numpy()
        values[f"logits_norm_{size}"] = logits.norm(dim=1).numpy()
    return values


def gradient(model: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    """d(sum of logits) / d(image), [h, w, 3], of image [1, 3, h, w] in eval mode."""
    model.eval()
    image = image.to(next(model.parameters()).dtype).requires_grad_()
    (found,) = torch.autograd.grad(model(image).sum(), image)
    return found[0].permute(1, 2, 0)


def steady_image(single: torch.nn.Module, double: torch.nn.Module, size: int) -> int:
    """Index of the first image whose gradient does not hang on the rounding of one activation.

    A ReLU or a max pool that lies at its kink turns an error of 1e-6 into a gradient that is
    wrong by some percent, in torch's float32 as well.
    """
    generator = torch.Generator().manual_seed(0)
    for index, image in enumerate(images(size, CANDIDATES, double).split(1)):
        wanted = gradient(double, image)
        noises = torch.randn((TRIALS, *image.shape), generator=generator, dtype=image.dtype)
        found = (gradient(single, image * (1 + PERTURBATION * noise)) for noise in noises)
        if all(reference.relative_error(g, wanted) < STEADY for g in found):
            return index
    raise AssertionError(f"none of {CANDIDATES} images has a steady gradient")


def gradient_values(model: torch.nn.Module, size: int, index: int) -> dict[str, np.ndarray]:
    found = gradient(model, images(size, index + 1, model)[index:])
    sampled = found[::GRADIENT_STEP, ::GRADIENT_STEP]
    return {"gradient": sampled.numpy(), "gradient_norm": found.norm().numpy()}


def trained(model: torch.nn.Module, name: str, size: int) -> dict[str, np.ndarray]:
    """The logits of all heads with batch statistics; the running ones move by it."""
    model.train()
    with torch.no_grad():
        outputs = model(images(size, TRAIN_BATCH, model))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    heads = TRAIN_OUTPUTS[name] if len(outputs) > 1 else ("logits",)
    values = {}
    for head, logits in zip(heads, outputs, strict=True):
        values[f"train_{head}_{size}"] = logits[:, :TRAIN_LOGITS].numpy()
        values[f"train_{head}_norm_{size}"] = logits.norm(dim=1).numpy()
    return values


def results(model: torch.nn.Module, name: str, gradient_at: list[int]) -> dict[str, np.ndarray]:
    sizes = SIZES.get(name, DEFAULT_SIZES)
    values = evaluated(model, sizes)
    if gradient_at:
        values |= gradient_values(model, *gradient_at)
    if name == reference.CAFFE_ARCHITECTURE:  # without a norm, training computes the same
        return values
    if name == "inception_v3":
        values |= trained(model, name, INCEPTION_AUXILIARY_SIZE)
        model.aux_logits, model.AuxLogits = False, None
    return values | trained(model, name, TRAIN_SIZES.get(name, sizes[0]))


def write_architecture(name: str) -> pathlib.Path:
    single, double = build(name), build(name).double()
    sizes = SIZES.get(name, DEFAULT_SIZES)
    gradient_at = []
    if name in reference.GRADIENT_ARCHITECTURES:
        size = GRADIENT_SIZES.get(name, sizes[0])
        gradient_at = [size, steady_image(single, double, size)]
        print(f"  gradient at image {gradient_at[1]} of size {size}")
    description = {
        "shapes": {key: list(tensor.shape) for key, tensor in single.state_dict().items()},
        "num_parameters": sum(parameter.numel() for parameter in single.parameters()),
        "sizes": sizes,
        "gradient_at": gradient_at,
    }
    values = {k: v.astype(np.float32) for k, v in results(double, name, gradient_at).items()}
    errors = {
        key: float(f"{reference.relative_error(found, values[key]):.0e}")
        for key, found in results(single, name, gradient_at).items()
    }
    for key, error in errors.items():
        print(f"  {key:24s} {error:.0e}")
    return reference.write(name, {**description, "float32_errors": errors}, values)


def to_torch(name: str, array: np.ndarray) -> torch.Tensor:
    """In float64: images [b, h, w, c] to [b, c, h, w], kernels [h, w, i, o] to [o, i, h, w]."""
    axes = {"image": (0, 3, 1, 2), "kernel": (3, 2, 0, 1)}.get(name.rstrip("12"))
    array = array if axes is None else array.transpose(axes)
    return torch.from_numpy(np.array(array, np.float64)).requires_grad_()


def from_torch(name: str, tensor: torch.Tensor) -> np.ndarray:
    kind = name.removeprefix("gradient_").rstrip("12")
    axes = {"image": (0, 2, 3, 1), "output": (0, 2, 3, 1), "kernel": (2, 3, 1, 0)}.get(kind)
    array = tensor.detach().numpy().astype(np.float32)
    return array if axes is None else array.transpose(axes)


class Layers:
    """Collects the description and the arrays of `layers.npz`."""

    def __init__(self):
        self.description: dict[str, dict] = {}
        self.arrays: dict[str, dict[str, np.ndarray]] = {}

    def add(self, operation: str, function: Callable, settings: dict, **inputs: np.ndarray) -> str:
        """Run `function(*inputs, **settings)` and its backward; return the name of the case."""
        shapes = ["x".join(map(str, array.shape)) for array in inputs.values() if array.ndim == 4]
        shown = [f"{key}_{value}".replace(" ", "") for key, value in settings.items()]
        name = "-".join([operation, *shapes, *shown])
        if name in self.description:
            raise AssertionError(f"two cases are named {name}")
        tensors = {key: to_torch(key, array) for key, array in inputs.items()}
        output = function(*tensors.values(), **settings)
        cotangent = normal(name, output.permute(0, 2, 3, 1).shape)
        gradients = torch.autograd.grad(
            (output * to_torch("image", cotangent)).sum(), tuple(tensors.values())
        )
        arrays = {**inputs, "output": from_torch("output", output), "cotangent": cotangent}
        for key, tensor in zip(inputs, gradients, strict=True):
            arrays[f"gradient_{key}"] = from_torch(f"gradient_{key}", tensor)
        self.description[name] = {"operation": operation, "settings": settings}
        self.arrays[name] = arrays
        return name

    def write(self) -> pathlib.Path:
        for name, arrays in self.arrays.items():
            self.description[name]["shapes"] = {key: a.shape for key, a in arrays.items()}
        flat = [array.ravel() for arrays in self.arrays.values() for array in arrays.values()]
        return reference.write("layers", self.description, {"flat": np.concatenate(flat)})


def normal(key: str, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def add_pools(layers: Layers):
    """Every side from 5 to 9; integers make ties, negative ones tell padding from zeros."""
    sides = [(5, 9), (6, 8), (7, 7), (8, 6), (9, 5)]
    windows = [(2, 2, 0), (2, 3, 0), (2, 2, 1), (3, 1, 1), (3, 2, 0), (3, 2, 1)]
    names = ("kernel_size", "stride", "padding", "ceil_mode")
    for (height, width), window, ceil in itertools.product(sides, windows, (False, True)):
        settings = dict(zip(names, (*window, ceil), strict=True))
        rng = np.random.default_rng([height, *window])
        image = rng.integers(-4, 1, (1, height, width, 2)).astype(np.float32)
        layers.add("max_pool2d", F.max_pool2d, settings, image=image)
        image = normal("average", (1, height, width, 2))
        for include in (False, True) if window[2] else (True,):
            averaged = {**settings, "count_include_pad": include}
            layers.add("avg_pool2d", F.avg_pool2d, averaged, image=image)


def add_adaptive_pools(layers: Layers):
    sides = [(2, 3), (3, 7), (7, 8), (8, 13), (13, 2)]
    for (height, width), size in itertools.product(sides, (1, 4, 5, 6, 7)):
        image = normal("adaptive", (1, height, width, 2))
        settings = {"output_size": size}
        layers.add("adaptive_avg_pool2d", F.adaptive_avg_pool2d, settings, image=image)


def add_convolutions(layers: Layers):
    """Kernel [h, w], stride, padding [h, w] and groups as the families have them."""
    plain = [
        ((1, 7), 1, (0, 3), 1),
        ((7, 1), 1, (3, 0), 1),
        ((1, 1), 2, (0, 0), 1),
        ((3, 3), 2, (0, 0), 1),
        ((3, 3), 2, (1, 1), 1),
        ((3, 3), 2, (1, 1), 4),
        ((5, 5), 2, (2, 2), 4),
        ((7, 7), 2, (3, 3), 1),
        ((11, 11), 4, (2, 2), 1),
    ]
    for sides, (kernel, stride, padding, groups) in itertools.product(CONV_SIDES, plain):
        settings = {"stride": stride, "padding": padding, "groups": groups}
        add_convolution(layers, "conv2d", F.conv2d, sides, kernel, settings)
    for sides, size, groups in itertools.product(CONV_SIDES, (3, 5), (1, 4)):
        settings = {"stride": (2, 2), "groups": groups}
        # TensorFlow's padding, which depends on the size of the image.
        function = timm.layers.conv2d_same
        add_convolution(layers, "conv2d_same", function, sides, (size, size), settings)


def add_convolution(layers: Layers, operation: str, function, sides, kernel, settings: dict):
    groups = settings["groups"]
    channels_in, channels_out = (3, 2) if groups == 1 else (groups, groups)
    layers.add(
        operation,
        function,
        settings,
        image=normal("convolved", (2, *sides, channels_in)),
        kernel=normal("kernel", (*kernel, channels_in // groups, channels_out)),
    )


def add_norms(layers: Layers):
    for alpha, channels in itertools.product((1e-4, 1e-1), (3, 9)):
        layers.add(
            "local_response_norm",
            F.local_response_norm,
            {"size": 5, "alpha": alpha, "beta": 0.75, "k": 1.0},
            # Large enough for the smaller alpha to act.
            image=normal("responses", (2, 3, 4, channels), scale=30.0),
        )
    for momentum, eps in ((0.1, 1e-5), (0.01, 1e-3)):
        # Both are moved in place.
        moved = {
            "mean": to_torch("mean", normal("mean", (5,))).detach(),
            "var": to_torch("var", normal("var", (5,)) ** 2).detach(),
        }
        before = {key: from_torch(key, tensor).copy() for key, tensor in moved.items()}
        settings = {"momentum": momentum, "eps": eps}

        def step(image, scale, bias, momentum, eps, moved=moved):
            mean, var = moved["mean"], moved["var"]
            return F.batch_norm(image, mean, var, scale, bias, True, momentum, eps)

        name = layers.add(
            "batch_norm",
            step,
            settings,
            image=normal("normalized", (4, 3, 2, 5), scale=2.0) + 1,
            scale=normal("scale", (5,)),
            bias=normal("bias", (5,)),
        )
        after = {f"new_{key}": from_torch(key, tensor) for key, tensor in moved.items()}
        layers.arrays[name] |= before | after


def add_squeeze_excitation(layers: Layers):
    module = torchvision.ops.SqueezeExcitation(6, 2, activation=torch.nn.SiLU).double()

    def squeeze_excite(image, kernel1, bias1, kernel2, bias2):
        parameters = {"fc1.weight": kernel1, "fc1.bias": bias1}
        parameters |= {"fc2.weight": kernel2, "fc2.bias": bias2}
        return torch.func.functional_call(module, parameters, (image,))

    layers.add(
        "squeeze_excitation",
        squeeze_excite,
        {},
        image=normal("squeezed", (2, 5, 4, 6), scale=2.0) + 1,
        kernel1=normal("kernel1", (1, 1, 6, 2)),
        bias1=normal("bias1", (2,)),
        kernel2=normal("kernel2", (1, 1, 2, 6)),
        bias2=normal("bias2", (6,)),
    )


def write_layers() -> pathlib.Path:
    layers = Layers()
    add_pools(layers)
    add_adaptive_pools(layers)
    add_convolutions(layers)
    add_norms(layers)
    add_squeeze_excitation(layers)
    return layers.write()


def main():
    names = ("layers", *reference.ARCHITECTURES, reference.CAFFE_ARCHITECTURE)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    for name in parser.parse_args().only:
        print(name, flush=True)
        path = write_layers() if name == "layers" else write_architecture(name)
        print(f"  {path.name}: {path.stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    main()
