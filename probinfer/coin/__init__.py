"""Particles that are carried to a density without a learning rate."""

from probinfer.coin.descent import CloudInfo, CloudState, descent
from probinfer.coin.diagnostics import particles_for, predicted_sd
from probinfer.coin.em import EMInfo, EMState, em
from probinfer.coin.engine import SVGD
from probinfer.coin.geometry import Diagonal, Full, Identity
from probinfer.coin.ksd_descent import KSDDescent, ksd_descent
from probinfer.coin.lawgd import lawgd
from probinfer.coin.lawgd_engine import LAWGD
from probinfer.coin.low_rank import LowRank
from probinfer.coin.mied import MIEDInfo, MIEDState, mied
from probinfer.coin.mirrored import MirroredInfo, MirroredState, mirrored_svgd, mirrored_svmd
from probinfer.coin.mirrors import BijectorMirror, Box, Orthant, Simplex, mirror_from_bijector
from probinfer.coin.reports import ParticlesInfo
from probinfer.coin.svgd import svgd

__all__ = [
    "LAWGD",
    "SVGD",
    "BijectorMirror",
    "Box",
    "CloudInfo",
    "CloudState",
    "Diagonal",
    "EMInfo",
    "EMState",
    "Full",
    "Identity",
    "KSDDescent",
    "LowRank",
    "MIEDInfo",
    "MIEDState",
    "MirroredInfo",
    "MirroredState",
    "Orthant",
    "ParticlesInfo",
    "Simplex",
    "descent",
    "em",
    "ksd_descent",
    "lawgd",
    "mied",
    "mirror_from_bijector",
    "mirrored_svgd",
    "mirrored_svmd",
    "particles_for",
    "predicted_sd",
    "svgd",
]
