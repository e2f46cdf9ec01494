"""The decoder of a U-Net over the maps of any backbone (Ronneberger et al. 2015)."""

import itertools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from medtl_jax.errors import UserError
from medtl_jax.models import kernels
from medtl_jax.models.layers import Conv, ConvNormAct, LayerSettings

DECODER = "decoder"
_WIDEST = 4096


def parse_widths(text: str) -> tuple[int, ...]:
    """The widths in `config.model.decoder`: `"64,32"` -> `(64, 32)`. UserError for other texts."""
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError:
        widths = ()
    return check_widths(widths, text)


def check_widths(widths: tuple[int, ...], text: str = "") -> tuple[int, ...]:
    """`widths` again. UserError unless they are one or more numbers of channels."""
    if not widths or not all(1 <= width <= _WIDEST for width in widths):
        raise UserError(
            f"model.decoder={text or ','.join(map(str, widths))}: write numbers of channels from "
            f"1 to {_WIDEST}, the coarsest map's first, separated by commas: 256,128,64,32,16"
        )
    return widths


def last_of_each_size(maps: Sequence[jax.Array]) -> list[jax.Array]:
    """Of the maps `[b, h, w, c]` in forward order, the last of each height and width."""
    return [list(group)[-1] for _, group in itertools.groupby(maps, lambda x: x.shape[1:3])]


def upsample(x: jax.Array, height: int, width: int) -> jax.Array:
    """`[b, h, w, c]` -> `[b, height, width, c]`: each pixel repeated, the centre kept.

    Rows (and columns) are repeated by `_repeats`, the stride that lies between the maps. What is
    then too much or missing comes from padding and is cut off, or filled with the edge's values,
    on both sides. An odd pixel goes to the end, where the strided layers have theirs.
    """
    b, *sizes, c = x.shape
    targets = height, width
    times = [_repeats(size, target) for size, target in zip(sizes, targets, strict=True)]
    if times != [1, 1]:
        spread = (b, sizes[0], times[0], sizes[1], times[1], c)
        x = jnp.broadcast_to(x[:, :, None, :, None], spread)
        x = x.reshape(b, sizes[0] * times[0], sizes[1] * times[1], c)
    surplus = [now - wanted for now, wanted in zip(x.shape[1:3], targets, strict=True)]
    top, left = (max(extra, 0) // 2 for extra in surplus)
    x = x[:, top : top + height, left : left + width]
    missing = [(max(-extra, 0) // 2, (max(-extra, 0) + 1) // 2) for extra in surplus]
    return jnp.pad(x, ((0, 0), *missing, (0, 0)), mode="edge") if any(map(any, missing)) else x


def _repeats(size: int, target: int) -> int:
    """The power of two nearest to `target / size`, on a logarithmic scale."""
    return 2 ** max(0, round(math.log2(target / size)))


def blocks_of_pixels(image: jax.Array) -> jax.Array:
    """`[b, h, w, c]` -> `[b, ceil(h / 2), ceil(w / 2), 4 c]`: 2x2 pixels side by side.

    An odd last row or column is repeated.
    """
    b, height, width, c = image.shape
    image = jnp.pad(image, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    rows, columns = -(-height // 2), -(-width // 2)
    blocks = image.reshape(b, rows, 2, columns, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(b, rows, columns, 4 * c)


def pixels_of_blocks(x: jax.Array, height: int, width: int) -> jax.Array:
    """`[b, ceil(height / 2), ceil(width / 2), 4 c]` -> `[b, height, width, c]`: the way back."""
    b, rows, columns, c = x.shape
    pixels = x.reshape(b, rows, columns, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return pixels.reshape(b, 2 * rows, 2 * columns, c // 4)[:, :height, :width]


class UpBlock(nn.Module):
    """`[b, h, w, width]` from a coarser map and a skip `[b, h, w, c]`.

    The coarser map is projected to `width` channels and enlarged (the up-convolution), the skip
    is put beside it, and two 3x3 convolutions follow. A 1x1 projection gives the same before as
    after the enlargement, for a quarter of the work.
    """

    width: int
    settings: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array, *, update: bool) -> jax.Array:
        x = Conv(self.width, dtype=self.settings.dtype, name="project")(x)
        x = jnp.concatenate([upsample(x, *skip.shape[1:3]), skip], axis=-1)
        for name in ("conv1", "conv2"):
            layer = ConvNormAct(self.width, 3, padding=1, settings=self.settings, name=name)
            x = layer(x, update=update)
        return x


class ImageBlock(nn.Module):
    """`[b, h, w, width]` from a coarser map and the image `[b, h, w, c]` itself.

    A sub-pixel convolution (Shi et al. 2016): on a map of half the size, where each position sees
    2x2 pixels of the image, `4 width` channels are computed, which become the channels of 2x2
    pixels. On CPU it trains in half the time of two narrow convolutions at full size.
    """

    width: int
    settings: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array, image: jax.Array, *, update: bool) -> jax.Array:
        blocks = blocks_of_pixels(image)
        x = jnp.concatenate([upsample(x, *blocks.shape[1:3]), blocks], axis=-1)
        layer = ConvNormAct(4 * self.width, 3, padding=1, settings=self.settings, name="conv")
        return pixels_of_blocks(layer(x, update=update), *image.shape[1:3])


class Decoder(nn.Module):
    """`[b, h, w, c]` at the size of the image, from the image and the maps of a backbone.

    From the deepest map upwards, `up1`, `up2`, ... join it with the last map of each larger size.
    Where the first layer has a stride, a last one joins the image itself, so that thin structures
    stay sharp.

    Attributes:
      widths: channels after each of them, the last at the size of the image, the one before at
        the next smaller size. Where the network has fewer sizes than widths, the first widths are
        without use.
      dropout: rate of whole channels of the deepest map, where the U-Net's paper has it.
    """

    widths: tuple[int, ...]
    dropout: float
    settings: LayerSettings

    @nn.compact
    def __call__(self, image: jax.Array, maps: Sequence[jax.Array], *, update: bool) -> jax.Array:
        *skips, x = levels = last_of_each_size(maps)
        sizes = zip(levels[0].shape[1:3], image.shape[1:3], strict=True)
        joins_image = any(_repeats(*pair) > 1 for pair in sizes)
        widths = self._last_widths(len(skips) + joins_image)
        x = nn.Dropout(self.dropout, (1, 2), deterministic=not update, name="dropout")(x)
        for number, (width, skip) in enumerate(zip(widths, reversed(skips), strict=False), 1):
            x = UpBlock(width, self.settings, name=f"up{number}")(x, skip, update=update)
        if joins_image:
            x = ImageBlock(widths[-1], self.settings, name="image")(x, image, update=update)
        return upsample(x, *image.shape[1:3])

    def _last_widths(self, count: int) -> tuple[int, ...]:
        """The last `count` widths. UserError where there are fewer."""
        if count > len(self.widths):
            raise UserError(
                f"model.decoder={','.join(map(str, self.widths))}: at this image size the network "
                f"has {count} sizes to pass through; write {count} numbers of channels"
            )
        return self.widths[len(self.widths) - count :]


class PixelHead(nn.Module):
    """float32 logits `[b, h, w, classes]` of every pixel of a map: a 1x1 convolution."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # The few channels of a map need larger weights than the many features of a classifier.
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (1, 1, x.shape[-1], self.num_classes))
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        return kernels.conv(x.astype(jnp.float32), kernel, 1, ((0, 0), (0, 0))) + bias
