"""Batch normalisation (Ioffe & Szegedy 2015) with an explicit choice of statistics."""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

# What the norms of a group do in training, by the names in `config.transfer.bn`.
POLICIES = ("train", "stats", "freeze", "reestimate", "renorm")


@flax.struct.dataclass
class Stored:
    """`update` of a stage that trains and whose norms use and keep the stored statistics."""


STORED = Stored()


@flax.struct.dataclass
class Renorm:
    """`update` for batch renormalisation (Ioffe 2017) within the limits `r_max` and `d_max`.

    Attributes:
      r_max: float32, at least 1: the batch's deviation over the stored one is taken as at least
        `1 / r_max` and at most `r_max`.
      d_max: float32, at least 0: the batch's mean lies at most so many stored deviations away
        from the stored mean.
    """

    r_max: jax.Array | float
    d_max: jax.Array | float


Statistics = Stored | Renorm


@flax.struct.dataclass
class InDomain:
    """`update` for the images of another domain than 0: with its own statistics alone.

    It is as true as what it holds.

    Attributes:
      index: of the domain, from 1; static.
      update: what the norms do with that domain's statistics.
    """

    index: int = flax.struct.field(pytree_node=False)
    update: bool | Statistics

    def __bool__(self) -> bool:
        return bool(self.update)


# All but False, in whatever domain, are true: what else depends on whether the stage trains tests
# `update` for truth.
Update = bool | Statistics | InDomain


def domain_key(index: int) -> str:
    """The name, among a norm's variables, of those of domain `index`, from 1."""
    return f"domain{index}"


def batch_moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and (biased) variance, float32 `[c]`, of `x` `[b, h, w, c]`; they have no gradient."""
    wide = jax.lax.stop_gradient(x).astype(jnp.float32)
    mean = wide.mean((0, 1, 2))
    return mean, jnp.square(wide - mean).mean((0, 1, 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def normalize_batch(x, mean, var, scale, bias, eps):
    """`(x - mean) / sqrt(var + eps) * scale + bias`, of the shape and dtype of `x` `[b, h, w, c]`.

    `mean` and `var` `[c]` are the `batch_moments` of `x`. The gradient with respect to `x` counts
    that they depend on `x`; they themselves get none. It is the closed form, with `x`, the mean
    and the reciprocal deviation as its only residuals.
    """
    return _normalize_forward(x, mean, var, scale, bias, eps)[0]


def _normalize_forward(x, mean, var, scale, bias, eps):
    inverse = jax.lax.rsqrt(var + eps)
    y = ((x.astype(jnp.float32) - mean) * (inverse * scale) + bias).astype(x.dtype)
    return y, (x, mean, inverse, scale)


def _normalize_backward(eps, residuals, cotangent):
    del eps
    x, mean, inverse, scale = residuals
    dy = cotangent.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * inverse
    count = x.shape[0] * x.shape[1] * x.shape[2]
    scale_gradient = (dy * normed).sum((0, 1, 2))
    bias_gradient = dy.sum((0, 1, 2))
    dx = (scale * inverse) * (dy - bias_gradient / count - normed * (scale_gradient / count))
    none = jnp.zeros_like(mean)
    return dx.astype(x.dtype), none, none, scale_gradient, bias_gradient


normalize_batch.defvjp(_normalize_forward, _normalize_backward)


class BatchNorm(nn.Module):
    """Normalised `[b, h, w, c]`, by the batch's statistics or by the stored ones.

    `update` says by which:

    - True: by the batch's own mean and variance, and the stored ones move:
      `stored = momentum * stored + (1 - momentum) * batch`.
    - False (evaluation, or a frozen stage in training): by the stored ones, which stay as they
      are.
    - `STORED`: the same, in a stage that trains.
    - `Renorm`: batch renormalisation (Ioffe 2017). With deviations `sqrt(var + eps)`, r is the
      batch's over the stored one and d how many stored ones the batch's mean lies above the stored
      mean, both within the limits and without a gradient: `y = (normed * r + d) * scale + bias`.
      Inside the limits that is what the stored statistics give, and the gradient still knows that
      the batch's own depend on `x`. The stored ones move as for True (the paper moves the
      deviation, here it is the variance).
    - `InDomain`: any of these with the statistics of another domain (Chang et al. 2019); those of
      all others stay as they are.

    Domain 0 has its statistics as `mean` and `var` `[c]`, domain i as
    `domain<i>/mean` and `domain<i>/var`.

    Attributes:
      momentum: Flax's convention, 1 - torch's.
      eps: added to the variance; part of the weights' definition.
      dtype: of the result; statistics are always float32.
      domains: number of the domains with statistics of their own.
      domain_affine: each has its own `scale` and `bias` too, under the same names.
    """

    momentum: float
    eps: float
    dtype: jnp.dtype = jnp.float32
    domains: int = 1
    domain_affine: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, update: Update) -> jax.Array:
        index, update = (
            (update.index, update.update) if isinstance(update, InDomain) else (0, update)
        )
        if index not in range(self.domains):
            raise ValueError(f"domain {index} of a norm that knows {self.domains}")
        scale, bias, mean, var = self._values(index, (x.shape[-1],))
        if not update or isinstance(update, Stored):
            factor = scale * jax.lax.rsqrt(var + self.eps)
            offset = bias - mean * factor
            return x * factor.astype(x.dtype) + offset.astype(x.dtype)
        moments = batch_mean, batch_var = batch_moments(x)
        if isinstance(update, Renorm):
            r, d = _correction(moments, (mean, var), self.eps, update)
            scale, bias = scale * r, bias + scale * d
        y = normalize_batch(x, *moments, scale, bias, self.eps)
        if not self.is_initializing():
            keep = self.momentum
            moved = {
                "mean": keep * mean + (1 - keep) * batch_mean,
                "var": keep * var + (1 - keep) * batch_var,
            }
            # Of a domain they are one variable, which holds both.
            for name, value in moved.items() if index == 0 else [(domain_key(index), moved)]:
                self.put_variable("batch_stats", name, value)
        return y.astype(self.dtype)

    def _values(self, index: int, shape: tuple[int]) -> tuple[jax.Array, ...]:
        """`scale, bias, mean, var` of a domain. A network has the variables of all of them."""
        ones, zeros = jnp.ones, jnp.zeros
        affine = {
            "scale": self.param("scale", nn.initializers.ones, shape),
            "bias": self.param("bias", nn.initializers.zeros, shape),
        }
        statistics = {
            "mean": self.variable("batch_stats", "mean", zeros, shape).value,
            "var": self.variable("batch_stats", "var", ones, shape).value,
        }
        for other in range(1, self.domains):
            key = domain_key(other)
            stored = self.variable(
                "batch_stats", key, lambda: {"mean": zeros(shape), "var": ones(shape)}
            )
            own = affine
            if self.domain_affine:
                own = self.param(key, lambda _: {"scale": ones(shape), "bias": zeros(shape)})
            if other == index:
                affine, statistics = own, stored.value
        return affine["scale"], affine["bias"], statistics["mean"], statistics["var"]


def _correction(moments, stored, eps: float, limits: Renorm) -> tuple[jax.Array, jax.Array]:
    """r and d `[c]` of Ioffe (2017), algorithm 1; like the batch's moments, without a gradient."""
    (batch_mean, batch_var), (mean, var) = moments, stored
    inverse = jax.lax.rsqrt(var + eps)
    r = jnp.clip(jnp.sqrt(batch_var + eps) * inverse, 1 / limits.r_max, limits.r_max)
    d = jnp.clip((batch_mean - mean) * inverse, -limits.d_max, limits.d_max)
    return r, d
