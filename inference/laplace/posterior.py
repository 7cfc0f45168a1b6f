"""The posterior that Laplace returns."""

from pyrolora.inference.posterior import Posterior


class LaplacePosterior(Posterior):
    """A `Posterior` that predicts by its linearisation unless told otherwise.

    Usage::

        posterior.predict(task.test)                          # quasi-random Gaussian logits around the estimate
        posterior.predict(task.test, kind="linearised_mf1")   # the same in closed form
        posterior.predict(task.test, kind="mc", draws=10)     # weight draws through the network
    """

    @property
    def default_kind(self) -> str:
        """``"linearised"``: the curvature is that of the linearised model. ``"mc"`` beside gates drawn for single rows."""
        return "linearised" if "linearised" in self.kinds else super().default_kind
