"""The logarithm of the normal distribution function and all its derivatives, accurate in both tails.

With h(z) = φ(z)/Φ(z), the derivatives of log Φ are h, −h κ₁, ... where κ_n = n/(t + κ_{n+1}), t = −z, is the continued
fraction of the Mills ratio: h = t + κ₁. Since κ_n′(z) = κ_n (κ_{n+1} − κ_n), every order is a sum of products of these
positive numbers. Left of z = −3 (in float32, −1) they are computed by the continued fraction, right of it from h.
The derivatives of ``jax.scipy.special.log_ndtr`` lose all digits of the second derivative at z = −1e4.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.scipy.special import erfc

from probinfer.core.types import Array, Float

__all__ = ["inverse_mills", "log_ndtr", "log_ndtr_derivatives", "truncated_variance"]

_DEPTH = 46  # last term of the continued fraction: rounding level at z = -3 (in float32, -1)
_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)


@jax.custom_jvp
def log_ndtr(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """Log Φ(z); it and its derivatives have a relative error of rounding at every z.

    References:
        Abramowitz and Stegun (1964), 26.2.14 (the continued fraction).
    """
    left, right = _split(z)
    tail = -0.5 * left**2 - _LOG_SQRT_2PI - jnp.log(left + _fraction(left, 1))
    below, above = 0.5 * erfc(-jnp.minimum(right, 0.0) * math.sqrt(0.5)), 0.5 * erfc(right * math.sqrt(0.5))
    body = jnp.where(right > 0, jnp.log1p(-jnp.minimum(above, 0.5)), jnp.log(below))
    return jnp.where(z < _switch(z), tail, body)


@jax.custom_jvp
def inverse_mills(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """h(z) = φ(z)/Φ(z), the first derivative of log Φ."""
    left, right = _split(z)
    body = jnp.exp(-0.5 * right**2 - _LOG_SQRT_2PI) / (0.5 * erfc(-right * math.sqrt(0.5)))
    return jnp.where(z < _switch(z), left + _fraction(left, 1), body)


@jax.custom_jvp
def _second(z):
    return -inverse_mills(z) * _kappa(1, z)


@jax.custom_jvp
def truncated_variance(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 + (log Φ)″(z) = 1 − h κ₁, the variance of a standard normal variable known to be below z."""
    # In the tail 1 − h κ₁ cancels: it is κ₁ (κ₂ − κ₁).
    kappa1, kappa2 = _kappa(1, z), _kappa(2, z)
    return jnp.where(z < _switch(z), kappa1 * (kappa2 - kappa1), 1 - inverse_mills(z) * kappa1)


def _third(z):
    # h κ₁ (2κ₁ − κ₂) = h κ₁² κ₂ (κ₃ − κ₂), of which the second form does not cancel in the tail
    kappa1, kappa2, kappa3 = (_kappa(n, z) for n in (1, 2, 3))
    tail, body = kappa1 * kappa2 * (kappa3 - kappa2), 2 * kappa1 - kappa2
    return inverse_mills(z) * kappa1 * jnp.where(z < _switch(z), tail, body)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _kappa(n, z):
    left, right = _split(z)
    value = right + jnp.exp(-0.5 * right**2 - _LOG_SQRT_2PI) / (0.5 * erfc(-right * math.sqrt(0.5)))
    for k in range(1, n):
        value = k / value + right
    return jnp.where(z < _switch(z), _fraction(left, n), value)


@_kappa.defjvp
def _kappa_jvp(n, primals, tangents):
    (z,), (dz,) = primals, tangents
    value = _kappa(n, z)
    return value, value * (_kappa(n + 1, z) - value) * dz


def _fraction(t, n):
    """κ_n(t) from the inside out, started at the fixed point of the last term (the same chain for all n).

    A loop in the compiled program: unrolled, it would be most of what a classifier compiles.
    """
    last = max(_DEPTH, n + 20)

    def step(i, value):
        return (last - 1 - i).astype(t.dtype) / (t + value)

    return jax.lax.fori_loop(0, last - n, step, 0.5 * (jnp.sqrt(t**2 + 4.0 * last) - t))


def _switch(z):
    """The z below which the continued fraction is used: as soon as its error is at rounding level."""
    return -3.0 if z.dtype == jnp.float64 else -1.0


def _split(z):
    return jnp.maximum(-z, -_switch(z)), jnp.maximum(z, _switch(z))


def _set_derivative(fn, derivative):
    def jvp(primals, tangents):
        (z,), (dz,) = primals, tangents
        return fn(z), derivative(z) * dz

    fn.defjvp(jvp)


_set_derivative(log_ndtr, inverse_mills)
_set_derivative(inverse_mills, _second)
_set_derivative(_second, _third)
_set_derivative(truncated_variance, _third)


@jax.custom_jvp
def log_ndtr_derivatives(
    z: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Log Φ(z) and its first three derivatives, all from one continued fraction."""
    left, right = _split(z)
    tail = z < _switch(z)
    kappa3 = _fraction(left, 3)
    kappa2 = 2 / (left + kappa3)
    kappa1 = 1 / (left + kappa2)
    below, above = 0.5 * erfc(-right * math.sqrt(0.5)), 0.5 * erfc(right * math.sqrt(0.5))
    log_body = jnp.where(right > 0, jnp.log1p(-jnp.minimum(above, 0.5)), jnp.log(below))
    body = jnp.exp(-0.5 * right**2 - _LOG_SQRT_2PI) / below
    h = jnp.where(tail, left + kappa1, body)
    body_kappa1 = right + body
    log_p = jnp.where(tail, -0.5 * left**2 - _LOG_SQRT_2PI - jnp.log(left + kappa1), log_body)
    kappa = jnp.where(tail, kappa1, body_kappa1)
    # 2κ₁ − κ₂, with κ₂ = 1/κ₁ − t (see ``_third``)
    factor = jnp.where(tail, kappa1 * kappa2 * (kappa3 - kappa2), 2 * body_kappa1 - 1 / body_kappa1 - right)
    return log_p, h, -h * kappa, h * kappa * factor


@log_ndtr_derivatives.defjvp
def _derivatives_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    values = log_ndtr_derivatives(z)
    fourth = jax.jvp(_third, (z,), (dz,))[1]  # compiled away if it is not used
    return values, (values[1] * dz, values[2] * dz, values[3] * dz, fourth)
