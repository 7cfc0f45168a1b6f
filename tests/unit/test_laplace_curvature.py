"""Jacobians and Gauss-Newton matrices of Laplace's approximation against autograd, one example at a time, in float64."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pyrolora.inference.laplace.curvature import LogitGradients, diagonal_curvature, full_curvature
from pyrolora.models.adapters import LastLayer, LoRA
from pyrolora.models.tasks import Example, OptionScoring, Split, Task

ADAPTERS = [LoRA(rank=2, alpha=4.0, layers=(1, 2)), LastLayer()]


@pytest.fixture(autouse=True)
def float64_norms(monkeypatch):
    """Llama normalises in float32 even in a float64 network, so gradients are linear to 1e-7 only: keep float64."""

    def forward(self, hidden):
        return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture
def model(three_topics_model):
    return three_topics_model(adapter=ADAPTERS)


def somewhere(model):
    """An estimate away from the start, where B is zero and half of the gradients vanish."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: 0.3 * torch.randn(site.shape, generator=generator, dtype=torch.float64)
        for name, site in model.adapter_sites.items()
    }


def explicit_jacobians(model, batch, estimate):
    """Logits ``(rows, classes)`` and site -> ``(rows, classes, *site.shape)``, each row by itself through autograd."""
    names, logits, rows = tuple(estimate), [], []
    for row in range(len(batch["labels"])):
        one = {key: value[row : row + 1] for key, value in batch.items()}

        def f(*values, one=one):
            return model.row_logits(one, dict(zip(names, values, strict=True)))[0]

        values = tuple(estimate[name] for name in names)
        logits.append(f(*values).detach())
        # torch.func knows no checkpointing, which option scoring uses
        rows.append(torch.autograd.functional.jacobian(f, values))
    return torch.stack(logits), {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(names)}


def explicit_gauss_newton(model, batch, estimate, name):
    """``sum_n J_n' (diag(p) - p p') J_n`` over the flattened weights of one site."""
    logits, jacobians = explicit_jacobians(model, batch, estimate)
    probs = logits.softmax(-1)
    hessian = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]
    flat = jacobians[name].flatten(2)
    return torch.einsum("nci,ncd,ndj->ij", flat, hessian, flat)


def whole_batch(model, data=None):
    data = model.encode(model.task.train if data is None else data)
    return data.batch(list(range(len(data))))


def relative(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_logit_jacobians_equal_autograd_row_by_row(model):
    estimate, batch = somewhere(model), whole_batch(model)
    logits, jacobians = LogitGradients(model, estimate, tuple(estimate)).jacobian(batch)
    wanted_logits, wanted = explicit_jacobians(model, batch, estimate)
    torch.testing.assert_close(logits, wanted_logits, rtol=0, atol=1e-10)
    for name in estimate:
        assert wanted[name].abs().max() > 1e-3, "a Jacobian of zeros would prove nothing"
        torch.testing.assert_close(jacobians[name].transpose(0, 1), wanted[name], rtol=0, atol=1e-10)


def test_only_the_named_sites_are_differentiated(model):
    estimate, batch = somewhere(model), whole_batch(model)
    _, some = LogitGradients(model, estimate, ("v_proj.lora_A",)).jacobian(batch)
    _, every = LogitGradients(model, estimate, tuple(estimate)).jacobian(batch)
    assert set(some) == {"v_proj.lora_A"}
    torch.testing.assert_close(some["v_proj.lora_A"], every["v_proj.lora_A"], rtol=0, atol=1e-12)


def test_diagonal_curvature_is_the_diagonal_of_the_explicit_sum(model):
    estimate = somewhere(model)
    gradients = LogitGradients(model, estimate, tuple(estimate))
    found = diagonal_curvature(gradients, model.encode(model.task.train).batches(5))
    for name in estimate:
        wanted = explicit_gauss_newton(model, whole_batch(model), estimate, name).diagonal()
        assert relative(found[name].flatten(), wanted) < 1e-8


@pytest.mark.parametrize("name", ["head.weight", "v_proj.lora_B"])
def test_full_curvature_is_the_explicit_sum(model, name):
    estimate = somewhere(model)
    gradients = LogitGradients(model, estimate, (name,))
    found = full_curvature(gradients, model.encode(model.task.train).batches(5))[name]
    wanted = explicit_gauss_newton(model, whole_batch(model), estimate, name)
    assert (wanted - wanted.diagonal().diag()).abs().max() > 1e-3 * wanted.abs().max()
    assert relative(found, wanted) < 1e-8


def test_curvature_does_not_depend_on_the_batch_size(model):
    estimate, data = somewhere(model), model.encode(model.task.train)
    gradients = LogitGradients(model, estimate, tuple(estimate))
    last_layer = LogitGradients(model, estimate, ("head.weight",))
    diagonal = diagonal_curvature(gradients, data.batches(len(data)))
    full = full_curvature(last_layer, data.batches(len(data)))["head.weight"]
    for size in (1, 5):
        for name, value in diagonal_curvature(gradients, data.batches(size)).items():
            assert relative(value, diagonal[name]) < 1e-10
        assert relative(full_curvature(last_layer, data.batches(size))["head.weight"], full) < 1e-10


@pytest.fixture
def options_model(three_topics_model):
    """A task whose second question has two options where the first has three."""
    examples = (
        Example({"q": "big dog"}, 0, ("run", "walk fire", "eat"), id="0"),
        Example({"q": "small cat"}, 1, ("see", "hear"), id="1"),
        Example({"q": "old tree river"}, 2, ("sun", "moon", "rain snow"), id="2"),
    )
    split = Split("train", "options", examples, 3)
    task = Task("options", ("A", "B", "C"), OptionScoring("{q} ?"), split, split, split, "", "")
    return three_topics_model(adapter=LoRA(rank=2, alpha=4.0), task=task)


def test_missing_options_take_no_part(options_model):
    model = options_model
    estimate, batch = somewhere(model), whole_batch(model)
    gradients = LogitGradients(model, estimate, tuple(estimate))
    logits, jacobians = gradients.jacobian(batch)
    assert logits.isfinite().tolist() == [[True] * 3, [True, True, False], [True] * 3]
    found = diagonal_curvature(gradients, iter([batch]))
    for name in estimate:
        assert jacobians[name].isfinite().all()
        assert (jacobians[name][2, 1] == 0).all()
        total = torch.zeros(model.adapter_sites[name].numel, dtype=torch.float64)
        # row by row over the options that exist
        for row, options in enumerate((3, 2, 3)):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            own, jacobian = explicit_jacobians(model, one, estimate)
            probs = own[0, :options].softmax(-1)
            flat = jacobian[name][0, :options].flatten(1)
            total += torch.einsum("ci,cd,di->i", flat, probs.diag() - probs.outer(probs), flat)
        assert relative(found[name].flatten(), total) < 1e-8


def test_the_backbone_and_the_estimate_are_left_alone(model):
    estimate = {name: value.requires_grad_() for name, value in somewhere(model).items()}
    before = {name: value.clone() for name, value in model.backbone.network.state_dict().items()}
    gradients = LogitGradients(model, estimate, tuple(estimate))
    with torch.no_grad():  # predictions run without gradients, and the Jacobian must turn them on for itself
        gradients.jacobian(whole_batch(model))
        diagonal_curvature(gradients, model.encode(model.task.train).batches(4))
    assert all(parameter.grad is None for parameter in model.backbone.network.parameters())
    assert not any(parameter.requires_grad for parameter in model.backbone.network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.network.state_dict().items())
    assert all(value.grad is None for value in estimate.values())
    assert not model.backbone._deltas, "the draw must not stay bound"
