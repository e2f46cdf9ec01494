"""Adversarial adaptation: features that do not tell a discriminator which domain they are of.

DANN (Ganin et al. 2016), CDAN and CDAN+E (Long et al. 2018). There is one loss for both sides:
the discriminator minimises it, and a gradient reversal between it and the network makes the
network maximise it with the strength lambda. What a term's arguments hold: see `alignment`; the
discriminator's parameters are `params["discriminator"]`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from medtl_jax.domain.alignment import (
    ADAPTATION,
    TARGET_DOMAIN,
    LogProbabilities,
    check_reads,
    counted,
    entropy,
    weighted_mean,
)
from medtl_jax.models.layers import Conv
from medtl_jax.transfer.groups import DISCRIMINATOR


def reverse_gradient(x: jax.Array, strength: jax.Array | float) -> jax.Array:
    """`x`, whose gradient is multiplied by `-strength` on the way back.

    The gradient reversal layer of Ganin et al. (2016). `strength`, `[]`, may be traced; it gets a
    gradient of 0.
    """
    return _reverse(x, jnp.asarray(strength, jnp.float32))


@jax.custom_vjp
def _reverse(x, strength):
    del strength
    return x


def _reverse_forward(x, strength):
    return x, strength


def _reverse_backward(strength, cotangent):
    reversed_cotangent = -strength * cotangent.astype(jnp.float32)
    return reversed_cotangent.astype(cotangent.dtype), jnp.zeros_like(strength)


_reverse.defvjp(_reverse_forward, _reverse_backward)


def ramp(step: jax.Array | int, total: int, peak: float = 1.0, gamma: float = 10.0) -> jax.Array:
    """The strength lambda at a step, float32 `[]`: `peak (2 / (1 + exp(-gamma p)) - 1)`.

    p is the share `step / total` of the updates that have been made (Ganin et al. 2016): 0 before
    the first, and near `peak` at the end. `step` may be traced.
    """
    passed = jnp.asarray(step, jnp.float32) / total
    # The same as the formula, without the difference of two numbers near 1.
    return peak * jnp.tanh(0.5 * gamma * passed)


class Discriminator(nn.Module):
    """The logits `[b]` that features `[b, d]` are of the source: two hidden layers and ReLU."""

    width: int = 1024

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _check_axes(x, "[b, d]", 2)
        for number in (1, 2):
            init = nn.initializers.he_normal()
            x = nn.relu(nn.Dense(self.width, kernel_init=init, name=f"hidden{number}")(x))
        init = nn.initializers.normal(0.01)
        return nn.Dense(1, kernel_init=init, name="logits")(x)[:, 0]


class MapDiscriminator(nn.Module):
    """The logits `[b, h', w']` that the parts of a map `[b, h, w, c]` are of the source.

    Convolutions with a stride and leaky ReLU, each position of the last a judgement of what it
    sees, as in Tsai et al. (2018).
    """

    widths: tuple[int, ...] = (64, 128, 256)
    kernel_size: int = 4
    stride: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _check_axes(x, "[b, h, w, c]", 4)
        conv = functools.partial(Conv, kernel_size=self.kernel_size, padding="same", use_bias=True)
        for number, width in enumerate(self.widths, 1):
            x = conv(width, stride=self.stride, name=f"conv{number}")(x)
            x = nn.leaky_relu(x, 0.2)
        return conv(1, name="logits")(x)[..., 0]


def _check_axes(x: jax.Array, wanted: str, axes: int) -> None:
    # With other axes the slice of the logits would be of something else.
    if x.ndim != axes:
        raise ValueError(f"the discriminator wants {wanted}, not {x.shape}")


def random_projection(widths: tuple[int, ...], to: int, seed: int) -> list[np.ndarray]:
    """A float32 matrix `[width, to]` of standard normal values for each of `widths`."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((width, to), np.float32) for width in widths]


def condition(
    features: jax.Array, probability: jax.Array, widest: int = 4096, to: int = 1024, seed: int = 0
) -> jax.Array:
    """What CDAN's discriminator reads of features `[b, d]` and probabilities `[b, k]`.

    Their outer product `[b, d k]`, or, where that is wider than `widest`, the product of a random
    projection of each, `[b, to]`, over `sqrt(to)`, whose inner products are those of the outer
    products in expectation (Long et al. 2018). The same `seed` and widths give the same
    projections. ValueError for what has other axes.
    """
    if features.ndim != 2 or probability.ndim != 2:
        raise ValueError(f"CDAN: want [b, d] and [b, k], not {features.shape}, {probability.shape}")
    (b, d), k = features.shape, probability.shape[1]
    if d * k <= widest:
        return (features[:, :, None] * probability[:, None]).reshape(b, d * k)
    first, second = random_projection((d, k), to, seed)
    return (features @ first) * (probability @ second) / np.float32(np.sqrt(to))


@flax.struct.dataclass
class Judgement:
    """What a discriminator makes of a batch of each domain, all float32 `[]`.

    Attributes:
      loss: its binary cross-entropy, in nats: the mean of those of the two domains.
      accuracy: the mean of the shares of both domains that it tells right; 0.5 is chance.
    """

    loss: jax.Array
    accuracy: jax.Array


@dataclasses.dataclass(frozen=True)
class Adversary:
    """The loss term of a discriminator, with the network against it. See `dann` and `cdan`.

    Called as a term it gives `judge`'s loss, and 1 as the count. The loss itself does not depend
    on the strength: the discriminator learns at its full rate from the first step.

    Attributes:
      discriminator: a module `[b, d] -> [b]` or `[b, h, w, c] -> [b, h', w']`.
      reads: the entry of the network's `out`. Of `logits` it reads the probabilities.
      conditional: it reads them together with the answers, see `condition`.
      entropy_weights: an example counts `1 + exp(-entropy)` of its answer.
      log_probabilities: of the logits.
      widest, projected, seed: of `condition`.
    """

    discriminator: nn.Module
    reads: str = "features"
    conditional: bool = False
    entropy_weights: bool = False
    log_probabilities: LogProbabilities = jax.nn.log_softmax
    widest: int = 4096
    projected: int = 1024
    seed: int = 0

    def __call__(self, out, batch, params, anchor) -> tuple[jax.Array, jax.Array]:
        del anchor
        return self.judge(out, batch, params).loss, jnp.ones(())

    def judge(self, out: Mapping, batch: Mapping, params: Mapping) -> Judgement:
        """The discriminator's `Judgement`; the arguments are those of a term."""
        target = batch[TARGET_DOMAIN]
        sides = (out, batch, 1.0), (target["out"], target, -1.0)
        losses, shares = [], []
        for answers, examples, sign in sides:
            read = self.inputs(answers, batch[ADAPTATION])
            variables = {"params": params[DISCRIMINATOR]}
            towards = sign * self.discriminator.apply(variables, read)
            real = counted(examples, towards)
            weight = real * self._certainty(answers, batch[ADAPTATION])
            losses.append(weighted_mean(-jax.nn.log_sigmoid(towards), weight))
            shares.append(weighted_mean((towards > 0).astype(jnp.float32), real))
        return Judgement(sum(losses) / 2, sum(shares) / 2)

    def inputs(self, out: Mapping, strength: jax.Array) -> jax.Array:
        """What the discriminator reads of `out`, with the gradient reversed behind it."""
        read = out[self.reads].astype(jnp.float32)
        if self.reads == "logits":
            read = jnp.exp(self.log_probabilities(read))
        read = reverse_gradient(read, strength)
        if not self.conditional:
            return read
        # As in the authors' code, the answers condition the features and learn nothing from it.
        answers = jnp.exp(jax.lax.stop_gradient(self._answers(out)))
        return condition(read, answers, self.widest, self.projected, self.seed)

    def initialize(self, out: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
        """`params["discriminator"]`, drawn for the shapes of a network's `out` with its `logits`.

        `out` are arrays or `jax.ShapeDtypeStruct`s.

        Raises:
          UserError: `out` has no entry `reads`.
          ValueError: it has other axes than the discriminator wants.
        """
        check_reads(out, (self.reads,))
        read = jax.eval_shape(self.inputs, dict(out), jnp.zeros(()))
        init = jax.jit(lambda key: self.discriminator.init(key, jnp.zeros(read.shape, read.dtype)))
        return init(key)["params"]

    def _answers(self, out: Mapping) -> jax.Array:
        return self.log_probabilities(out["logits"].astype(jnp.float32))

    def _certainty(self, out: Mapping, strength: jax.Array) -> jax.Array:
        """The weight `[b]` or `[]` of each example."""
        if not self.entropy_weights:
            return jnp.ones(())
        # The entropy is reversed too, as in the authors' code: the network, which is for a larger
        # loss, grows surer of its answers, most of those that the discriminator tells wrong.
        return 1 + jnp.exp(-reverse_gradient(entropy(self._answers(out)), strength))


def dann(
    discriminator: nn.Module,
    reads: str = "features",
    log_probabilities: LogProbabilities = jax.nn.log_softmax,
) -> Adversary:
    """The term of DANN (Ganin et al. 2016): the discriminator reads one entry of `out`.

    For masks that is a map (`stage4`, the bottleneck) or `logits` (the output, as in Tsai et al.
    2018), with a `MapDiscriminator`.
    """
    return Adversary(discriminator, reads, log_probabilities=log_probabilities)


def cdan(
    discriminator: nn.Module,
    *,
    entropy_weights: bool = False,
    log_probabilities: LogProbabilities = jax.nn.log_softmax,
    widest: int = 4096,
    projected: int = 1024,
    seed: int = 0,
) -> Adversary:
    """The term of CDAN, or with `entropy_weights` of CDAN+E (Long et al. 2018), for classes.

    The discriminator reads the features together with the answers, see `condition`. In CDAN+E an
    example counts `1 + exp(-entropy)` of its answer, over the sum of these in its domain, which
    has no gradient.
    """
    return Adversary(
        discriminator,
        conditional=True,
        entropy_weights=entropy_weights,
        log_probabilities=log_probabilities,
        widest=widest,
        projected=projected,
        seed=seed,
    )


def without_discriminator(variables: Mapping[str, Any]) -> dict[str, Any]:
    """`variables` of the network alone, without the discriminator's parameters."""
    params = {name: tree for name, tree in variables["params"].items() if name != DISCRIMINATOR}
    return {**variables, "params": params}
