"""Bayesian low-rank adapters for transformers, written as Pyro programs."""

__version__ = "0.1.0"
