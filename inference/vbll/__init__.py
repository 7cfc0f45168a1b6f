"""Variational Bayesian last layers: closed-form objectives, training, refit on cached features, one-pass prediction."""

from pyrolora.inference.vbll.engine import VBLL
from pyrolora.inference.vbll.posterior import LastLayerPosterior

__all__ = ["VBLL", "LastLayerPosterior"]
