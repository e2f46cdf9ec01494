"""GoogLeNet as Caffe's model zoo has it (Szegedy et al. 2015, table 1), on torch's functions.

Its differences from torchvision's: biases and local response normalisation instead of batch
norms, 5x5 kernels, max pools whose last window may hang over the edge, and images in blue, green,
red.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

# Table 1 of the paper: 1x1, 3x3 reduced and full, 5x5 reduced and full, projection of the pool.
WIDTHS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
# The blocks in front of which the map is halved.
POOLED = ("3a", "4a", "5a")


class GoogLeNet(torch.nn.Module):
    """Logits [b, 1000] of images [b, 3, h, w] in red, green, blue; the keys are Caffe's."""

    def __init__(self):
        super().__init__()
        for name, shape in layer_shapes():
            self.register_parameter(f"{name}/w", torch.nn.Parameter(torch.empty(shape)))
            self.register_parameter(f"{name}/b", torch.nn.Parameter(torch.empty(shape[0])))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv("conv1/7x7_s2", images.flip(1), stride=2, padding=3)
        x = normalized(halved(x))
        x = self.conv("conv2/3x3_reduce", x)
        x = normalized(self.conv("conv2/3x3", x, padding=1))
        for block in WIDTHS:
            x = self.inception(f"inception_{block}", halved(x) if block in POOLED else x)
        return F.linear(x.mean((2, 3)), *self.weights("loss3/classifier"))

    def inception(self, block: str, x: torch.Tensor) -> torch.Tensor:
        branches = (
            self.conv(f"{block}/1x1", x),
            self.conv(f"{block}/3x3", self.conv(f"{block}/3x3_reduce", x), padding=1),
            self.conv(f"{block}/5x5", self.conv(f"{block}/5x5_reduce", x), padding=2),
            self.conv(f"{block}/pool_proj", F.max_pool2d(x, 3, stride=1, padding=1)),
        )
        return torch.cat(branches, dim=1)

    def conv(self, name: str, x: torch.Tensor, stride: int = 1, padding: int = 0) -> torch.Tensor:
        return F.relu(F.conv2d(x, *self.weights(name), stride=stride, padding=padding))

    def weights(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.get_parameter(f"{name}/w"), self.get_parameter(f"{name}/b")


def layer_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape [o, i, h, w] or [o, i] of every layer's weight, in forward order."""
    yield "conv1/7x7_s2", (64, 3, 7, 7)
    yield "conv2/3x3_reduce", (64, 64, 1, 1)
    yield "conv2/3x3", (192, 64, 3, 3)
    channels = 192
    for block, (one, reduce3, three, reduce5, five, projection) in WIDTHS.items():
        yield f"inception_{block}/1x1", (one, channels, 1, 1)
        yield f"inception_{block}/3x3_reduce", (reduce3, channels, 1, 1)
        yield f"inception_{block}/3x3", (three, reduce3, 3, 3)
        yield f"inception_{block}/5x5_reduce", (reduce5, channels, 1, 1)
        yield f"inception_{block}/5x5", (five, reduce5, 5, 5)
        yield f"inception_{block}/pool_proj", (projection, channels, 1, 1)
        channels = one + three + five + projection
    yield "loss3/classifier", (1000, channels)


def halved(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, stride=2, ceil_mode=True)


def normalized(x: torch.Tensor) -> torch.Tensor:
    return F.local_response_norm(x, 5, alpha=1e-4, beta=0.75, k=1.0)
