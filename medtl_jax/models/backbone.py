"""The common shape of all networks: named stages, auxiliary heads, features, a head."""

from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from medtl_jax.models.layers import LayerSettings
from medtl_jax.models.norms import InDomain, Update
from medtl_jax.models.unet import DECODER, Decoder, PixelHead

HEAD = "head"
# The layers between the last stage's map and the head, where a network has some.
FEATURES = "features"
# The classifier that came with the weights, beside the new head.
SOURCE_HEAD = "source_head"
SOURCE_LOGITS = "source_logits"
# The part of an auxiliary head whose width is the number of classes.
HEAD_OF_AUXILIARY = "classifier"


class Backbone(nn.Module):
    """A network of named stages: `(logits [b, classes], out)` of an image `[b, h, w, c]`.

    `out` holds `stem`, `stage1` .. `stageN` as `[b, h', w', c']` maps and `features` `[b, d]`, the
    vector that the head reads. With `auxiliary`, in training, it also holds the logits of the
    auxiliary heads under their names. A family is a subclass that defines `trunk`.

    With a `decoder` it is a U-Net: the logits are `[b, h, w, classes]`, those of every pixel. The
    layers between the last stage and the classifier are left out and `features` is the mean of the
    last stage's map.

    Attributes:
      num_classes: width of the head.
      in_chans: channels of the image.
      offset: the first convolution has an `offset`, see `layers.Conv`.
      dropout: rate before the head (and inside `features`, where the original has it there).
      drop_path: block i of n drops its residual with the rate `drop_path * i / n`, in the
        families that have residuals; a frozen stage drops none.
      auxiliary: has the auxiliary heads of the original.
      decoder: widths of a `unet.Decoder`, which see; none for a network with a classifier. Its
        `dropout` is that of the deepest map's channels.
      source_classes: width of a second classifier named `source_head` on the same features, whose
        logits are `out["source_logits"]`; 0 = there is none.
      momentum, eps, dtype, domains, domain_affine: see `LayerSettings`.
    """

    num_classes: int
    in_chans: int = 3
    offset: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    auxiliary: bool = False
    decoder: tuple[int, ...] = ()
    source_classes: int = 0
    momentum: float = 0.9
    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    domains: int = 1
    domain_affine: bool = False

    # Whether `drop_path` has anything to drop.
    has_residuals = False
    # False where the original has no dropout between the features and the classifier.
    drops_features = True

    @property
    def settings(self) -> LayerSettings:
        """What the layers have in common."""
        return LayerSettings(self.momentum, self.eps, self.dtype, self.domains, self.domain_affine)

    def trunk(self) -> Iterator[tuple[str, nn.Module]]:
        """The stages in forward order; each is called as `stage(x, update=...)`.

        The last may be `features`; where its result is still a map, it is averaged over space.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no stages")

    def auxiliary_heads(self) -> dict[str, tuple[str, nn.Module]]:
        """stage -> `(name, head)`: the auxiliary head that reads the stage's map."""
        return {}

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        train: bool = False,
        frozen: tuple[str, ...] = (),
        domain: int = 0,
        taps: Mapping[str, jax.Array] | None = None,
        norms: Mapping[str, Update] | None = None,
        start: str = "",
        remat: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`(logits, out)`, see the class.

        Args:
          image: normalised; with `start`, the map before that part, or the features `[b, d]`.
          train: dropout acts and the batch norms use the batch's statistics, which then move.
          frozen: parts of the network for which `train` does not hold.
          domain: whose statistics the batch norms use and move, one of `domains`; static.
          taps: stage -> what is added to its map, of the same shape. The derivative with respect
            to a tap of zeros is that with respect to the map.
          norms: part -> what the batch norms do while it trains, see `norms.BatchNorm`; those of
            the parts not named use the batch's statistics.
          start: the first part to be run: a stage, or `head`. What comes before it is not in `out`.
          remat: in training, a stage's values are computed again where its gradient is, instead of
            being kept: less memory, more time, the same result.
        """
        if domain not in range(self.domains):
            raise ValueError(f"domain {domain}: this model keeps the statistics of {self.domains}")
        trunk, out = list(self.trunk()), {}
        names = [name for name, _ in trunk]
        if start and (start not in (*names, HEAD) or self.decoder):
            raise ValueError(f"start={start!r} of a network of {', '.join(names)}")
        if not start and image.shape[-1] != self.in_chans:
            raise ValueError(f"an image of {image.shape[-1]} channels, in_chans={self.in_chans}")

        def update(name):
            how = train and name not in frozen and (norms or {}).get(name, True)
            return InDomain(domain, how) if domain else how

        heads = self.auxiliary_heads() if self.auxiliary else {}
        x = image = image.astype(self.dtype)
        first = names.index(start) if start in names else len(names) * (start == HEAD)
        for name, stage in trunk[first:]:
            if self.decoder and name == FEATURES:
                break
            again = remat and train and name not in frozen
            x = _run_stage(stage, x, update(name), again)
            if taps and name in taps:
                x = x + taps[name].astype(x.dtype)
            out[name] = x
            if name in heads and (train or self.is_initializing()):
                auxiliary, head = heads[name]
                out[auxiliary] = head(x, update=update(auxiliary))
        if taps and not taps.keys() <= out.keys():
            raise ValueError(f"taps {', '.join(taps)}: the stages are {', '.join(out)}")
        if self.decoder:
            logits = self._decode(image, out, update(DECODER))
        x = x.mean((1, 2), dtype=jnp.float32) if x.ndim == 4 else x.astype(jnp.float32)
        out[FEATURES] = x
        if self.source_classes:
            out[SOURCE_LOGITS] = nn.Dense(self.source_classes, name=SOURCE_HEAD)(x)
        return (logits if self.decoder else self._classify(x, train)), out

    def _classify(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits `[b, classes]` of the pooled features `[b, d]`."""
        if self.drops_features:
            x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name=HEAD)(x)

    def _decode(self, image: jax.Array, out: Mapping[str, jax.Array], update: Update) -> jax.Array:
        """Logits `[b, h, w, classes]` of the image's pixels, from the maps of the stages."""
        decoder = Decoder(self.decoder, self.dropout, self.settings, name=DECODER)
        x = decoder(image, list(out.values()), update=update)
        return PixelHead(self.num_classes, name=HEAD)(x)


def _run_stage(stage: nn.Module, x: jax.Array, how: Update, again: bool) -> jax.Array:
    """The stage's map; with `again` nothing inside it is kept for the gradient."""

    def run(stage, x):
        return stage(x, update=how)

    return (nn.remat(run) if again else run)(stage, x)
