"""Particles that are carried to a density without a learning rate."""

from probinfer.coin.descent import CloudInfo, CloudState, descent
from probinfer.coin.em import EMInfo, EMState, em
from probinfer.coin.geometry import Diagonal, Full, Identity
from probinfer.coin.low_rank import LowRank
from probinfer.coin.mied import MIEDInfo, MIEDState, mied
from probinfer.coin.mirrored import MirroredInfo, MirroredState, mirrored_svgd, mirrored_svmd
from probinfer.coin.mirrors import BijectorMirror, Box, Orthant, Simplex, mirror_from_bijector
from probinfer.coin.svgd import svgd

__all__ = [
    "BijectorMirror",
    "Box",
    "CloudInfo",
    "CloudState",
    "Diagonal",
    "EMInfo",
    "EMState",
    "Full",
    "Identity",
    "LowRank",
    "MIEDInfo",
    "MIEDState",
    "MirroredInfo",
    "MirroredState",
    "Orthant",
    "Simplex",
    "descent",
    "em",
    "mied",
    "mirror_from_bijector",
    "mirrored_svgd",
    "mirrored_svmd",
    "svgd",
]
