"""Mixup and CutMix: each image of a batch is mixed with another one, and so is its loss or target.

Of classes it is the loss that is mixed: a mixed batch is a batch with one entry more, `partner`,
the targets of the images that were mixed in, and `share`, how much of the loss is of the images'
own. `mixed_loss` reads it; a batch without it has the loss that it always had. Measured numbers are
mixed themselves, and their batches have no `partner`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from medtl_jax.errors import UserError
from medtl_jax.keys import named_key

Batch = Mapping[str, Any]

PARTNER = "partner"
# Of an example, whatever the task: what stays with its image.
_LABELS = ("target", "mask")


@dataclasses.dataclass(frozen=True)
class Mix:
    """How the images of a batch are mixed; at least one of the two is on.

    Attributes:
      mixup: alpha of the Beta distribution of mixup's lambda (Zhang et al. 2018); 0 = off.
      cutmix: alpha of that of CutMix (Yun et al. 2019); 0 = off. With both on, each batch draws
        one of them with equal chances.
    """

    mixup: float = 0.0
    cutmix: float = 0.0


def make_mix(augment: Mapping) -> Mix | None:
    """What `config.augment` asks for; None where it mixes nothing.

    UserError for an alpha that is not in 0..100.
    """
    alphas = {name: augment.get(name, 0.0) for name in ("mixup", "cutmix")}
    for name, alpha in alphas.items():
        if not 0 <= alpha <= 100:
            raise UserError(f"augment.{name}={alpha} must lie in 0..100")
    return Mix(**alphas) if any(alphas.values()) else None


def check_mix(augment: Mapping, task: str) -> None:
    """UserError where the images of a task called `task` cannot be mixed so."""
    if task == "regress" and augment["cutmix"]:
        raise UserError(
            f"augment.cutmix={augment['cutmix']} means nothing for the task regress: a number that "
            "is measured in an image is no share of its area; set it to 0, or use augment.mixup"
        )


def mix_batch(key: jax.Array, batch: Batch, mix: Mix) -> dict[str, Any]:
    """The batch with its images mixed, and `partner` with the classes that go with it.

    One lambda for the batch, from Beta(alpha, alpha), and one permutation of it: image i is mixed
    with image p(i), which may be i itself. Mixup: `lambda x_i + (1 - lambda) x_p(i)`. CutMix: a
    box of the area 1 - lambda with its centre anywhere, clipped to the image, shows x_p(i); lambda
    then is what is left of the area. Masks are cut and pasted with their images.

    Targets of a floating dtype, measured numbers, come back as `lambda t_i + (1 - lambda) t_p(i)`,
    NaN where one of the two is unknown, and without `partner`: of a loss that is not the
    cross-entropy, such as Huber's, the mixed losses are not least at the mixed number.

    Args:
      key: of the step, for this use alone.
      batch: `image` float32 `[b, h, w, c]`; `target` `[b, ...]`, masks `[b, h, w]`; perhaps
        `mask`, bool `[b]`.
      mix: static.
    """
    image, target = batch["image"], batch["target"]
    order = jax.random.permutation(named_key(key, "partner"), image.shape[0])
    weight, share, pasted = _weights(key, image.shape[1:3], mix)
    partner = {name: batch[name][order] for name in _LABELS if name in batch}
    mixed = {**batch, "image": weight * image + (1.0 - weight) * image[order]}
    if jnp.issubdtype(target.dtype, jnp.floating):
        if "mask" in batch:
            mixed["mask"] = batch["mask"] & partner["mask"]
        return {**mixed, "target": share * target + (1.0 - share) * partner["target"]}
    if target.ndim == 3 and mix.cutmix:
        target = jnp.where(pasted, partner["target"], target)
        # Where masks are pasted there is one truth a pixel, and nothing to share.
        share = jnp.where(pasted.any(), 1.0, share)
    return {**mixed, "target": target, PARTNER: {**partner, "share": share}}


def _weights(key: jax.Array, size: tuple[int, int], mix: Mix):
    """`(weight [h, w, 1] of the own image, its share of the loss, bool [h, w] pasted)`."""
    mixup = cutmix = None
    if mix.mixup:
        share = jax.random.beta(named_key(key, "mixup"), mix.mixup, mix.mixup)
        mixup = jnp.full((*size, 1), share), share, jnp.zeros(size, bool)
    if mix.cutmix:
        pasted = _box(named_key(key, "cutmix"), size, mix.cutmix)
        weight = 1.0 - pasted.astype(jnp.float32)
        cutmix = weight[..., None], weight.mean(), pasted
    if mixup is None or cutmix is None:
        return mixup or cutmix
    which = jax.random.bernoulli(named_key(key, "which"))
    return jax.tree.map(lambda one, other: jnp.where(which, one, other), mixup, cutmix)


def _box(key: jax.Array, size: tuple[int, int], alpha: float) -> jax.Array:
    """bool `[h, w]`: the pixels of CutMix's box (Yun et al. 2019, equation 2)."""
    of_area, *of_centre = jax.random.split(key, 3)
    side = jnp.sqrt(1.0 - jax.random.beta(of_area, alpha, alpha))

    def inside(key: jax.Array, length: int) -> jax.Array:
        half = jnp.round(side * length / 2.0)
        centre = jax.random.randint(key, (), 0, length).astype(jnp.float32)
        pixel = jnp.arange(length, dtype=jnp.float32)
        return (pixel >= centre - half) & (pixel < centre + half)

    rows, columns = (inside(k, n) for k, n in zip(of_centre, size, strict=True))
    return rows[:, None] & columns


def mixed_loss(term: Callable, out, batch: Batch, params, anchor) -> tuple[jax.Array, jax.Array]:
    """`(sum, count)` of a loss term of `objectives.losses`, of a batch that may be mixed.

    That is `share` times sum and count with the images' own labels, and 1 - share times those with
    their partners'. A permutation leaves a count as it is, so the quotient is
    `lambda L(target) + (1 - lambda) L(partner's target)`.
    """
    own = term(out, batch, params, anchor)
    if PARTNER not in batch:
        return own
    partner = dict(batch[PARTNER])
    share = partner.pop("share")
    other = term(out, {**batch, **partner}, params, anchor)
    return tuple(share * a + (1.0 - share) * b for a, b in zip(own, other, strict=True))
