"""What a network does to signals, and to attacks: measured layer by layer, the model left alone."""

from sphereopt.diagnostics.amplify import Amplification, Normalizer, amplification
from sphereopt.diagnostics.attack import fgsm, pgd
from sphereopt.diagnostics.findings import Finding
from sphereopt.diagnostics.signal import Layer, Propagation, propagation

__all__ = [
    "Amplification",
    "Finding",
    "Layer",
    "Normalizer",
    "Propagation",
    "amplification",
    "fgsm",
    "pgd",
    "propagation",
]
