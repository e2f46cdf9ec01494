"""Batch normalisation (Ioffe & Szegedy 2015) with an explicit choice of statistics."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_batch(x, scale, bias, eps):
    """Normalised `x` `[b, h, w, c]` with the batch's mean and (biased) variance `[c]`.

    Returns `(y, mean, var)`. The gradient is the closed form with `x`, the mean and the
    reciprocal deviation as its only residuals; none flows through the returned statistics.
    """
    return _normalize_forward(x, scale, bias, eps)[0]


def _normalize_forward(x, scale, bias, eps):
    wide = x.astype(jnp.float32)
    mean = wide.mean((0, 1, 2))
    var = jnp.square(wide - mean).mean((0, 1, 2))
    inverse = jax.lax.rsqrt(var + eps)
    y = ((wide - mean) * (inverse * scale) + bias).astype(x.dtype)
    return (y, mean, var), (x, mean, inverse, scale)


def _normalize_backward(eps, residuals, cotangents):
    del eps
    x, mean, inverse, scale = residuals
    dy = cotangents[0].astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * inverse
    count = x.shape[0] * x.shape[1] * x.shape[2]
    scale_gradient = (dy * normed).sum((0, 1, 2))
    bias_gradient = dy.sum((0, 1, 2))
    dx = (scale * inverse) * (dy - bias_gradient / count - normed * (scale_gradient / count))
    return dx.astype(x.dtype), scale_gradient, bias_gradient


normalize_batch.defvjp(_normalize_forward, _normalize_backward)


class BatchNorm(nn.Module):
    """Normalised `[b, h, w, c]`, by the batch's statistics or by the stored ones.

    With `update=True` the batch is normalised by its own mean and variance and the stored
    ones move: `stored = momentum * stored + (1 - momentum) * batch`. With `update=False`
    (evaluation, or a frozen stage in training) the stored ones are used and stay as they are.

    Attributes:
      momentum: Flax's convention, 1 - torch's.
      eps: added to the variance; part of the weights' definition.
      dtype: of the result; statistics are always float32.
    """

    momentum: float
    eps: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, update: bool) -> jax.Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        if not update:
            factor = scale * jax.lax.rsqrt(var.value + self.eps)
            offset = bias - mean.value * factor
            return x * factor.astype(x.dtype) + offset.astype(x.dtype)
        y, batch_mean, batch_var = normalize_batch(x, scale, bias, self.eps)
        if not self.is_initializing():
            keep = self.momentum
            mean.value = keep * mean.value + (1 - keep) * jax.lax.stop_gradient(batch_mean)
            var.value = keep * var.value + (1 - keep) * jax.lax.stop_gradient(batch_var)
        return y.astype(self.dtype)
