"""Laplace approximations of the posterior over adapter sites."""

from pyrolora.inference.laplace.engine import Laplace
from pyrolora.inference.laplace.posterior import LaplacePosterior

__all__ = ["Laplace", "LaplacePosterior"]
