"""Positive-definite kernels: each is the frozen pytree of its hyperparameters."""

from probinfer.kernels.base import Kernel
from probinfer.kernels.composite import ActiveDims, Product, Scaled, Sum
from probinfer.kernels.inverse_multiquadric import InverseMultiquadric
from probinfer.kernels.nonstationary import Constant, Linear, Polynomial, White
from probinfer.kernels.stationary import (
    RBF,
    Matern12,
    Matern32,
    Matern52,
    Periodic,
    RationalQuadratic,
    Stationary,
)
from probinfer.kernels.warp import Warped

__all__ = [
    "RBF",
    "ActiveDims",
    "Constant",
    "InverseMultiquadric",
    "Kernel",
    "Linear",
    "Matern12",
    "Matern32",
    "Matern52",
    "Periodic",
    "Polynomial",
    "Product",
    "RationalQuadratic",
    "Scaled",
    "Stationary",
    "Sum",
    "Warped",
    "White",
]
