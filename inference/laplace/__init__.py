"""Laplace approximations of the posterior over adapter sites."""

from pyrolora.inference.laplace.engine import Laplace, LaplacePosterior

__all__ = ["Laplace", "LaplacePosterior"]
