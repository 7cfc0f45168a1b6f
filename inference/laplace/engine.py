"""Laplace's approximation: a Normal around a MAP estimate whose precision is curvature plus prior."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyrolora.guides import Guide, build_guide
from pyrolora.guides.base import Family
from pyrolora.guides.full_covariance import MOST_WEIGHTS, FullCovariance, FullCovarianceFactor
from pyrolora.guides.mean_field import MeanField, NormalFactor
from pyrolora.guides.point import Point
from pyrolora.inference.laplace.curvature import LogitGradients, diagonal_curvature, full_curvature
from pyrolora.inference.laplace.precision import (
    LOG_PRECISION_BOUNDS,
    NormalPrior,
    declared_prior,
    evidence_precision,
    log_evidence,
)
from pyrolora.inference.laplace.predictive import Covariance, linearised_logits, softmax_draws
from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.predictive import Batch
from pyrolora.models.naming import nearest
from pyrolora.models.program import BayesianModel
from pyrolora.models.tasks import EncodedSplit, Split
from pyrolora.models.trunk import TrunkCache

logger = logging.getLogger(__name__)

STRUCTURES = ("diag", "last_layer")
PRECISIONS = ("declared", "evidence", "validation")
# candidates of a validation search, evenly spaced in the logarithm of the precision
CANDIDATES = 19


@dataclass(frozen=True)
class Laplace:
    """A Normal posterior from the generalised Gauss-Newton matrix at the MAP estimate.

    Usage::

        posterior = Laplace(structure="diag").fit(model, task.train)
        posterior = Laplace().fit(model, task.train, estimate=map_posterior, validation=task.validation)

    Every site has the precision ``sum_n J_n' H_n J_n + prior precision``; the estimate is this project's own `MAP` under
    the declared prior. The curvature needs one forward and ``classes`` backwards a batch, and any batch size gives the
    same sum.

    Source: MacKay 1992; Daxberger et al., "Laplace Redux", 2021; Yang et al., "Bayesian Low-Rank Adaptation for Large
    Language Models", 2024.

    Args:
        structure: ``"diag"`` for a factorised Normal over adapter sites; ``"last_layer"`` for a dense one over
            ``head.weight``, the site of `LastLayer`.
        precision: ``"declared"`` uses the prior as declared; ``"evidence"`` replaces its scale, site by site, by the one
            that maximises the marginal likelihood; ``"validation"`` multiplies the declared precision by the number that
            minimises the negative log-likelihood of validation data.
        sites: glob pattern of the sites that become Normal; the rest stay at the estimate.
        estimate: settings of the MAP fit, if none is passed to `fit`.
        batch_size: examples at once while curvature is summed.

    Raises:
        ValueError: an unknown structure or precision; the nearest valid name is offered.
    """

    structure: str = field(default="diag", metadata={"help": "'diag' or 'last_layer'"})
    precision: str = field(default="declared", metadata={"help": "'declared', 'evidence' or 'validation'"})
    sites: str | None = field(default=None, metadata={"help": "glob pattern of the sites; None for all it applies to"})
    estimate: MAP = field(default_factory=MAP, metadata={"help": "settings of the MAP fit"})
    batch_size: int = field(default=16, metadata={"help": "examples at once"})

    def __post_init__(self) -> None:
        for name, valid in (("structure", STRUCTURES), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(
                    f"Unknown {name} {value!r} for Laplace. Did you mean {nearest(value, valid)!r}? "
                    f"Choices: {', '.join(valid)}."
                )

    def fit(
        self,
        model: BayesianModel,
        data: Split | EncodedSplit,
        *,
        progress: bool = True,
        generator: torch.Generator | None = None,
        estimate: Posterior | None = None,
        validation: Split | EncodedSplit | None = None,
    ) -> "LaplacePosterior":
        """Fit MAP if no estimate is given, then the curvature around it.

        Args:
            model: the model; its declared prior must be Normal on the sites that become Normal.
            data: training data.
            progress: show bars.
            generator: source of the seed of the MAP fit.
            estimate: a posterior of the same model whose mean is the estimate.
            validation: data for ``precision="validation"``; never the test data.

        Raises:
            ValueError: no site of that pattern, a prior that is not Normal, no validation data where they are needed,
                an estimate of other sites, or a site that a dense covariance cannot take.
        """
        names = self._names(model)
        priors = declared_prior(model, names)
        self._check_dense(model, priors)
        if self.precision == "validation" and validation is None:
            raise ValueError(
                "precision='validation' needs data to choose on: pass validation=task.validation to fit, or use "
                "precision='evidence'."
            )
        encoded = model.encode(data)
        encoded.require_trainable()
        if estimate is None:
            estimate = self.estimate.fit(model, encoded, progress=progress, generator=generator)
            # a learned scale has moved during the fit
            priors = declared_prior(model, names)
        mean = estimate.mean()
        for name, site in model.sites.items():
            if name not in mean or mean[name].shape != site.shape:
                raise ValueError(
                    f"The estimate has no value for the site {name!r} of shape {tuple(site.shape)}; its sites are "
                    f"{', '.join(mean)}. Pass a posterior of a model with the same adapters, or none to fit MAP here."
                )
        gradients = LogitGradients(model, mean, names)
        trunks = TrunkCache(model.backbone, model.first_block, len(encoded))

        def batches(what: str) -> Iterator[Batch]:
            total = -(-len(encoded) // self.batch_size)
            for batch in tqdm(
                encoded.batches(self.batch_size), total=total, desc=what, disable=not progress, leave=False
            ):
                yield trunks.attach(batch)

        sum_curvature = diagonal_curvature if self.structure == "diag" else full_curvature
        curvature = sum_curvature(gradients, batches("curvature"))
        eigenvalues = (
            curvature
            if self.structure == "diag"
            else {name: torch.linalg.eigvalsh(value.double()) for name, value in curvature.items()}
        )
        if self.precision == "evidence":
            priors = evidence_precision(mean, priors, eigenvalues)
        fit = CurvatureFit(self.structure, mean, curvature, priors)
        if self.precision == "validation" and validation is not None:
            fit = fit.rescaled(self._best_scale(model, fit, gradients, model.encode(validation), progress))
        log_likelihood = float(estimate.predict(encoded, kind="mean").log_likelihood.double().sum())
        record = {
            "engine": "Laplace",
            "structure": self.structure,
            "precision": self.precision,
            "sites": list(names),
            "num_data": len(encoded),
            "prior_precision": {name: float(prior.precision.mean()) for name, prior in fit.priors.items()},
            "log_evidence": log_evidence(log_likelihood, mean, fit.priors, eigenvalues),
            "estimate": estimate.record,
            "seed": estimate.record.get("seed"),
        }
        return LaplacePosterior(model, fit.guide(model), record)

    def _names(self, model: BayesianModel) -> tuple[str, ...]:
        pattern = self.sites or ("head.weight" if self.structure == "last_layer" else "*")
        names = tuple(site.name for site in model.adapter_sites.values() if site.matches(pattern))
        if not names:
            remedy = (
                " Add LastLayer() to the model's adapters."
                if self.structure == "last_layer"
                else f" Did you mean {nearest(pattern, model.adapter_sites)!r}?"
            )
            raise ValueError(
                f"Laplace found no site matching {pattern!r} among {', '.join(model.adapter_sites)}.{remedy}"
            )
        return names

    def _check_dense(self, model: BayesianModel, priors: Mapping[str, NormalPrior]) -> None:
        """Refuse, before any work, what a dense covariance cannot hold or its eigenvalues cannot describe."""
        if self.structure == "diag":
            return
        for name, prior in priors.items():
            if model.sites[name].numel > MOST_WEIGHTS:
                raise ValueError(
                    f"A dense covariance takes a site of at most {MOST_WEIGHTS:,} weights; {name!r} has "
                    f"{model.sites[name].numel:,}. Use structure='diag' there."
                )
            if prior.precision.numel() > 1:
                raise ValueError(
                    f"structure={self.structure!r} needs one prior scale for the whole site {name!r}; the declared "
                    f"Normal has scales of shape {tuple(prior.precision.shape)}. Declare dist.Normal(0., 0.1) there, "
                    "or use structure='diag'."
                )

    def _best_scale(
        self,
        model: BayesianModel,
        fit: "CurvatureFit",
        gradients: LogitGradients,
        validation: EncodedSplit,
        progress: bool,
    ) -> float:
        """Factor on the prior precision with the lowest validation NLL; one Jacobian serves every candidate."""
        factors = torch.linspace(*LOG_PRECISION_BOUNDS, CANDIDATES).exp().tolist()
        totals = torch.zeros(len(factors), dtype=torch.float64)
        all_candidates = fit.logit_covariances(factors)

        total = -(-len(validation) // self.batch_size)
        for batch in tqdm(
            validation.batches(self.batch_size), total=total, desc="validation", disable=not progress, leave=False
        ):
            mean, stacked = linearised_logits(gradients, batch, all_candidates)
            for index in range(len(factors)):
                probs = softmax_draws(mean, stacked[:, index], torch.Generator().manual_seed(0)).mean(0)
                labels = batch["labels"].to(probs.device)
                totals[index] -= float(probs.gather(-1, labels[:, None]).clamp_min(1e-30).log().sum())
        best = int(totals.argmin())
        if best in (0, len(factors) - 1):
            logger.warning(
                "The best factor on the prior precision, %.3g, lies at the edge of the search; the validation data "
                "want a posterior that is %s than any tried.", factors[best], "wider" if best == 0 else "narrower"
            )  # fmt: skip
        return factors[best]

    def to_dict(self) -> dict[str, Any]:
        """Settings, ready for JSON."""
        settings = {key: value for key, value in vars(self).items() if key != "estimate"}
        return {"engine": "Laplace", **settings, "estimate": self.estimate.to_dict()}


@dataclass(frozen=True)
class CurvatureFit:
    """Estimate, curvature and prior of the sites that become Normal.

    Attributes:
        structure: ``"diag"`` or ``"last_layer"``.
        mean: site name -> estimate, for all sites.
        curvature: site name -> diagonal of the site's shape, or dense ``(weights, weights)``.
        priors: site name -> prior.
    """

    structure: str
    mean: Mapping[str, Tensor]
    curvature: Mapping[str, Tensor]
    priors: Mapping[str, NormalPrior]

    def rescaled(self, factor: float) -> "CurvatureFit":
        """The same with every prior precision multiplied by a factor."""
        priors = {name: NormalPrior(prior.mean, prior.precision * factor) for name, prior in self.priors.items()}
        return CurvatureFit(self.structure, self.mean, self.curvature, priors)

    def spectra(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Eigenvalues of every site's curvature, and eigenvectors of the dense ones.

        Shape:
            site name -> the site's shape (diagonal) or ``(weights,)``, and ``(weights, weights)``
        """
        if self.structure == "diag":
            return dict(self.curvature), {}
        values, vectors = {}, {}
        for name, matrix in self.curvature.items():
            found, basis = torch.linalg.eigh(matrix.double())
            values[name], vectors[name] = found.clamp_min(0).to(matrix), basis.to(matrix)
        return values, vectors

    def guide(self, model: BayesianModel) -> Guide:
        """The posterior as a Pyro guide: Normal at the sites with curvature, a point elsewhere."""
        normal: Family = MeanField() if self.structure == "diag" else FullCovariance()
        families = {name: normal if name in self.curvature else Point() for name in model.sites}
        guide = build_guide(families, model, start=self.mean)
        for name, factor in guide.items():
            if isinstance(factor, NormalFactor):
                precision = self.curvature[name] + self.priors[name].precision
                factor.log_scale.data.copy_(-0.5 * precision.log())
            elif isinstance(factor, FullCovarianceFactor):
                factor.set_scale_tril(self.scale_tril(name).to(factor.loc))
        return guide

    def scale_tril(self, name: str) -> Tensor:
        """Lower Cholesky factor of a dense covariance, float64."""
        dense = self.curvature[name].double()
        precision = self.priors[name].precision.double().expand(self.mean[name].shape).flatten()
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(dense + precision.diag())))

    def logit_covariances(self, factors: Sequence[float]) -> Covariance:
        """A function from the Jacobian to ``J Sigma J'`` for several factors on the prior precision.

        In the eigenbasis of a dense curvature every one of them is diagonal, so one rotation serves all.

        Shape:
            the function returns ``(rows, factors, classes, classes)``
        """
        spectra, bases = self.spectra()
        scales = [
            {name: (values + self.priors[name].precision * factor).rsqrt() for name, values in spectra.items()}
            for factor in factors
        ]

        def covariances(jacobian: dict[str, Tensor]) -> Tensor:
            rotated = {
                name: value.flatten(2) @ bases[name] if name in bases else value for name, value in jacobian.items()
            }
            return torch.stack([logit_covariance(rotated, one.__getitem__) for one in scales], dim=1)

        return covariances


def logit_covariance(jacobian: Mapping[str, Tensor], scale_of: Any) -> Tensor:
    """``J Sigma J'`` summed over independent sites.

    Args:
        jacobian: site name -> ``(classes, rows, *site.shape)``.
        scale_of: site name -> standard deviations of the site's shape, or a lower Cholesky factor of the covariance of
            its flattened weights.

    Shape:
        ``(rows, classes, classes)``
    """
    total: Tensor | None = None
    for name, value in jacobian.items():
        scale = scale_of(name)
        factorised = scale.shape == value.shape[2:]
        scaled = (value * scale).flatten(2) if factorised else value.flatten(2) @ scale
        rows_first = scaled.transpose(0, 1)
        product = rows_first @ rows_first.mT
        total = product if total is None else total + product
    if total is None:
        raise ValueError("The Jacobian names no site.")
    return total


class LaplacePosterior(Posterior):
    """A Laplace posterior, which adds the prediction kind ``"linearised"`` and uses it by default.

    Usage::

        posterior.predict(task.test)                      # Gaussian logits around the estimate
        posterior.predict(task.test, kind="mc", draws=10)  # weight draws through the network
    """

    kinds: ClassVar[tuple[str, ...]] = ("linearised", "mc", "mean")

    @property
    def default_kind(self) -> str:
        """``"linearised"``: the curvature is that of the linearised model."""
        return "linearised"

    def _predictor(self, kind: str, draws: int, generator: torch.Generator | None) -> Any:
        if kind != "linearised":
            return super()._predictor(kind, draws, generator)
        factors = dict(self.guide.items())
        scales = {
            name: factor.scale.detach() if isinstance(factor, NormalFactor) else factor.scale_tril.detach()
            for name, factor in factors.items()
            if isinstance(factor, NormalFactor | FullCovarianceFactor)
        }
        gradients = LogitGradients(self.model, self.mean(), tuple(scales))
        # one set of quasi-random points for all rows, as one set of weight draws would be
        seed = int(torch.randint(2**31, (), generator=generator))

        def predict_batch(batch: Batch) -> Tensor:
            mean, covariance = linearised_logits(gradients, batch, lambda j: logit_covariance(j, scales.__getitem__))
            return softmax_draws(mean, covariance, torch.Generator().manual_seed(seed))

        return predict_batch
