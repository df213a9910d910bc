"""Objectives on re-noised samples: no trajectory, no log-prob, any solver. Pure functions of tensors."""

from .errors import ERROR_WEIGHTS, ErrorWeight, matching_error, mean_square, self_normalised, x0_scale
from .matching import awm, nft, optimality, orw, ram
from .preferences import best_and_worst, crd, dgpo, dpo
from .table import FORWARD, INPUTS, ForwardForm

__all__ = [
    "ERROR_WEIGHTS",
    "FORWARD",
    "INPUTS",
    "ErrorWeight",
    "ForwardForm",
    "awm",
    "best_and_worst",
    "crd",
    "dgpo",
    "dpo",
    "matching_error",
    "mean_square",
    "nft",
    "optimality",
    "orw",
    "ram",
    "self_normalised",
    "x0_scale",
]
