"""The published optimizers for scale-invariant weights, each as its authors run it."""

from sphereopt.optim.literature.adamp import SGDP, AdamP
from sphereopt.optim.literature.hyperball import AdamH, MuonH
from sphereopt.optim.literature.riemannian import SGDG, AdamG
from sphereopt.optim.literature.rotational import RotationalAdamW, RotationalLion, RotationalSGD
from sphereopt.optim.literature.spherical import AdamS, AdamSRT

__all__ = [
    "SGDG",
    "SGDP",
    "AdamG",
    "AdamH",
    "AdamP",
    "AdamS",
    "AdamSRT",
    "MuonH",
    "RotationalAdamW",
    "RotationalLion",
    "RotationalSGD",
]
