"""The posterior of a last-layer engine."""

from pyrolora.inference.posterior import Posterior


class LastLayerPosterior(Posterior):
    """A `Posterior` that predicts from Gaussian logits unless told otherwise: one pass of the network, exact logits.

    Usage::

        posterior.predict(task.test)                          # quasi-random logits
        posterior.predict(task.test, kind="linearised_mf1")   # closed form, deterministic, for serving
        decompose(posterior.predict(task.test).probs)         # total, aleatoric and epistemic uncertainty

    Logits are linear in the last layer, so nothing is approximated by linearising. Where other sites are random as well the
    default is weight draws through the network.
    """

    @property
    def default_kind(self) -> str:
        """``"linearised"`` where only the last layer is random, else ``"mc"``."""
        random = [name for name, factor in self.guide.items() if "scale" in factor.roles.values()]
        return "linearised" if len(random) == 1 and "linearised" in self.kinds else super().default_kind
