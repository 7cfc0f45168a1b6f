"""Jacobians and Gauss-Newton matrices of Laplace's approximation against autograd, one example at a time, in float64."""

import dataclasses

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pyrolora.inference.laplace import summation
from pyrolora.inference.laplace.structures import Kronecker
from pyrolora.inference.laplace.summation import FILE, new_structures, sum_curvature
from pyrolora.inference.logit_gradients import LogitGradients, each_logit, hessian_root
from pyrolora.models.adapters import LastLayer, LoRA
from pyrolora.models.backbones import Backbone
from pyrolora.models.program import BayesianModel
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


def jacobian(gradients, batch):
    return gradients.jacobians(batch, each_logit)


def curvature(model, estimate, names, structure, data=None, batch_size=5, rank=2, checkpoint=None):
    """Finished sums of some sites."""
    structures = new_structures(model, names, structure, rank)
    data = model.encode(model.task.train if data is None else data)
    gradients = LogitGradients(model, estimate, names)
    sum_curvature(gradients, structures, data, batch_size=batch_size, checkpoint=checkpoint, progress=False)
    return structures


def whole_batch(model, data=None):
    data = model.encode(model.task.train if data is None else data)
    return data.batch(list(range(len(data))))


def relative(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_logit_jacobians_equal_autograd_row_by_row(model):
    estimate, batch = somewhere(model), whole_batch(model)
    logits, jacobians = jacobian(LogitGradients(model, estimate, tuple(estimate)), batch)
    wanted_logits, wanted = explicit_jacobians(model, batch, estimate)
    torch.testing.assert_close(logits, wanted_logits, rtol=0, atol=1e-10)
    for name in estimate:
        assert wanted[name].abs().max() > 1e-3, "a Jacobian of zeros would prove nothing"
        torch.testing.assert_close(jacobians[name].transpose(0, 1), wanted[name], rtol=0, atol=1e-10)


def test_only_the_named_sites_are_differentiated(model):
    estimate, batch = somewhere(model), whole_batch(model)
    _, some = jacobian(LogitGradients(model, estimate, ("v_proj.lora_A",)), batch)
    _, every = jacobian(LogitGradients(model, estimate, tuple(estimate)), batch)
    assert set(some) == {"v_proj.lora_A"}
    torch.testing.assert_close(some["v_proj.lora_A"], every["v_proj.lora_A"], rtol=0, atol=1e-12)


def test_diagonal_curvature_is_the_diagonal_of_the_explicit_sum(model):
    estimate = somewhere(model)
    found = curvature(model, estimate, tuple(estimate), "diag")
    for name in estimate:
        wanted = explicit_gauss_newton(model, whole_batch(model), estimate, name).diagonal()
        assert relative(found[name].total.flatten(), wanted) < 1e-8


@pytest.mark.parametrize("name", ["head.weight", "v_proj.lora_B"])
def test_full_curvature_is_the_explicit_sum(model, name):
    estimate = somewhere(model)
    found = curvature(model, estimate, (name,), "full")[name].total
    wanted = explicit_gauss_newton(model, whole_batch(model), estimate, name)
    assert (wanted - wanted.diagonal().diag()).abs().max() > 1e-3 * wanted.abs().max()
    assert relative(found, wanted) < 1e-8


def test_hessian_root_is_a_root_with_one_column_less_than_classes():
    logits = torch.randn(6, 4, dtype=torch.float64) * torch.tensor([0.1, 1, 3, 30, 100, 1]).double()[:, None]
    logits[5, 2:] = -torch.inf
    root = hessian_root(logits)
    assert root.shape == (3, 6, 4)
    probs = logits.softmax(-1)
    wanted = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None]
    torch.testing.assert_close(torch.einsum("kri,krj->rij", root, root), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["head.weight", "v_proj.lora_A", "v_proj.lora_B"])
def test_kronecker_factors_are_sums_over_examples_tokens_and_columns(model, name):
    """Row by row without padding, token by token, column by column; 5 rows at once pad."""
    with torch.no_grad():
        # a network of its own has zeros there, and padding that is zero would not show in the sums
        model.backbone.network.get_input_embeddings().weight[0] = 1.0
    estimate, site = somewhere(model), model.sites[name]
    inputs = torch.zeros(site.shape[0] if site.modules else 1, site.shape[-1], site.shape[-1], dtype=torch.float64)
    outputs = torch.zeros(inputs.shape[0], site.shape[-2], site.shape[-2], dtype=torch.float64)
    tokens = 0
    data = model.encode(model.task.train)
    for row in range(len(data)):
        one = data.batch([row])
        _, columns = LogitGradients(model, estimate, (name,)).columns(one, hessian_root)
        for column, products in enumerate(columns):
            for entry, product in enumerate(products[name]):
                for activation, gradient in zip(product.inputs[0], product.gradients[0], strict=True):
                    outputs[entry] += gradient.outer(gradient)
                    if column == 0:
                        inputs[entry] += activation.outer(activation)
                        tokens += entry == 0
    found = curvature(model, estimate, (name,), "kron")[name]
    assert relative(found.inputs, inputs) < 1e-10
    assert relative(found.outputs, outputs) < 1e-10
    assert float(found.tokens) == tokens
    assert tokens == (12 if name == "head.weight" else sum(len(tokens) for tokens in data.rows))
    pairs = torch.stack(
        [torch.linalg.eigvalsh(torch.kron(g, a / tokens)) for g, a in zip(outputs, inputs, strict=True)]
    )
    assert relative(found.eigenvalues().sort(-1).values, pairs) < 1e-10


def test_kronecker_is_exact_for_one_example_of_one_token_of_a_head(model):
    """One row: ``(sum_c g g') kron (a a')`` is the Gauss-Newton matrix itself, not an approximation."""
    estimate, data = somewhere(model), Split("train", "three_topics", model.task.train.examples[:1], 3)
    found = curvature(model, estimate, ("head.weight",), "kron", data)["head.weight"]
    wanted = explicit_gauss_newton(model, whole_batch(model, data), estimate, "head.weight")
    assert relative(torch.kron(found.outputs[0], found.inputs[0] / found.tokens), wanted) < 1e-8


def test_low_rank_kronecker_keeps_the_leading_directions(model):
    estimate, names = somewhere(model), ("v_proj.lora_A",)
    whole = curvature(model, estimate, names, "kron")["v_proj.lora_A"]
    kept = curvature(model, estimate, names, "kron_lowrank", rank=3)["v_proj.lora_A"]
    assert isinstance(kept, Kronecker)
    assert kept.truncated
    assert not whole.truncated
    torch.testing.assert_close(kept.in_values, whole.in_values[:, -3:], rtol=1e-10, atol=0)
    assert kept.in_basis.shape == (2, 32, 3)
    assert kept.out_basis.shape == (2, 2, 2), "a side below the rank is kept whole"
    assert kept.eigenvalues().shape == whole.eigenvalues().shape
    assert (kept.eigenvalues() == 0).sum() == 2 * 2 * (32 - 3)


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_curvature_does_not_depend_on_the_batch_size(model, structure):
    names = ("head.weight", "v_proj.lora_B", "v_proj.lora_A")
    estimate = somewhere(model)
    whole = curvature(model, estimate, names, structure, batch_size=12)
    for size in (1, 5):
        for name, found in curvature(model, estimate, names, structure, batch_size=size).items():
            for key, value in found.state().items():
                assert relative(value, whole[name].state()[key]) < 1e-10


@pytest.mark.parametrize("size", [5, 12])
def test_the_log_likelihood_comes_with_the_curvature(model, size):
    estimate, names = somewhere(model), ("v_proj.lora_B",)
    data = model.encode(model.task.train)
    logits, _ = explicit_jacobians(model, whole_batch(model), estimate)
    wanted = float(logits.log_softmax(-1).gather(-1, data.labels[:, None]).sum())
    structures, gradients = new_structures(model, names, "diag", 2), LogitGradients(model, estimate, names)
    found = sum_curvature(gradients, structures, data, batch_size=size, checkpoint=None, progress=False)
    assert found == pytest.approx(wanted, rel=1e-12)


class TestResuming:
    """An interrupted pass goes on where it stood, and a finished one leaves nothing behind."""

    @pytest.fixture
    def interrupted(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr(summation, "CHECKPOINT_EVERY", 2)
        real, calls = LogitGradients.columns, []

        def columns(self, batch, cotangents):
            calls.append(len(batch["labels"]))
            if len(calls) == 4:
                raise KeyboardInterrupt
            return real(self, batch, cotangents)

        monkeypatch.setattr(LogitGradients, "columns", columns)
        with pytest.raises(KeyboardInterrupt):
            curvature(model, somewhere(model), tuple(model.sites), "kron", batch_size=2, checkpoint=tmp_path)
        assert (tmp_path / FILE).is_file()
        calls.clear()
        monkeypatch.setattr(LogitGradients, "columns", lambda *args: (calls.append(1), real(*args))[1])
        return calls

    def test_a_resumed_sum_is_the_sum(self, model, tmp_path, interrupted):
        names, data = tuple(model.sites), model.encode(model.task.train)
        gradients = LogitGradients(model, somewhere(model), names)
        totals, structures = [], [new_structures(model, names, "kron", 2) for _ in range(2)]
        for made, folder in zip(structures, (tmp_path, None), strict=True):
            totals.append(sum_curvature(gradients, made, data, batch_size=2, checkpoint=folder, progress=False))
            if folder is not None:
                assert len(interrupted) == 4, "two of the six batches were already in the sums"
        found, wanted = structures
        for name in wanted:
            for key, value in wanted[name].state().items():
                assert torch.equal(found[name].state()[key], value)
        assert totals[0] == totals[1]
        assert not list(tmp_path.iterdir())

    def test_the_sums_of_another_estimate_are_refused(self, model, tmp_path, interrupted):
        other = {name: value + 1 for name, value in somewhere(model).items()}
        with pytest.raises(ValueError, match=r"of another estimate, data set or structure"):
            curvature(model, other, tuple(model.sites), "kron", batch_size=2, checkpoint=tmp_path)

    def test_the_sums_of_other_words_or_adapters_are_refused(self, model, three_topics_model, tmp_path, interrupted):
        """Texts of the same lengths and labels, and an adapter that scales the same weights by another number."""
        first, *rest = model.task.train.examples
        swapped = dataclasses.replace(first, fields={"text": " ".join(reversed(first.fields["text"].split()))})
        assert swapped.fields != first.fields
        data = Split("train", "three_topics", (swapped, *rest), 3)
        scaled = three_topics_model(adapter=[LoRA(rank=2, alpha=8.0, layers=(1, 2)), LastLayer()])
        for other, texts in ((model, data), (scaled, model.task.train)):
            with pytest.raises(ValueError, match=r"of another estimate, data set or structure"):
                curvature(other, somewhere(model), tuple(model.sites), "kron", texts, batch_size=2, checkpoint=tmp_path)

    def test_damaged_sums_are_refused(self, model, tmp_path, interrupted):
        (tmp_path / FILE).write_bytes(b"not a tensor")
        with pytest.raises(ValueError, match=r"is damaged .*Delete it to start over"):
            curvature(model, somewhere(model), tuple(model.sites), "kron", batch_size=2, checkpoint=tmp_path)


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
    logits, jacobians = jacobian(gradients, batch)
    assert logits.isfinite().tolist() == [[True] * 3, [True, True, False], [True] * 3]
    found = curvature(model, estimate, tuple(estimate), "diag")
    for name in estimate:
        assert jacobians[name].isfinite().all()
        assert (jacobians[name][2, 1] == 0).all()
        total = torch.zeros(model.adapter_sites[name].numel, dtype=torch.float64)
        # row by row over the options that exist
        for row, options in enumerate((3, 2, 3)):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            own, explicit = explicit_jacobians(model, one, estimate)
            probs = own[0, :options].softmax(-1)
            flat = explicit[name][0, :options].flatten(1)
            total += torch.einsum("ci,cd,di->i", flat, probs.diag() - probs.outer(probs), flat)
        assert relative(found[name].total.flatten(), total) < 1e-8


def test_the_backbone_and_the_estimate_are_left_alone(model):
    estimate = {name: value.requires_grad_() for name, value in somewhere(model).items()}
    before = {name: value.clone() for name, value in model.backbone.network.state_dict().items()}
    gradients = LogitGradients(model, estimate, tuple(estimate))
    with torch.no_grad():  # predictions run without gradients, and the Jacobian must turn them on for itself
        gradients.jacobians(whole_batch(model), each_logit)
        curvature(model, estimate, tuple(estimate), "diag")
    assert all(parameter.grad is None for parameter in model.backbone.network.parameters())
    assert not any(parameter.requires_grad for parameter in model.backbone.network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.network.state_dict().items())
    assert all(value.grad is None for value in estimate.values())
    assert not model.backbone._deltas, "the draw must not stay bound"


class TestDefectsOfOtherLibraries:
    """What published Kronecker-Laplace code for LoRA gets wrong, and no other test here would show.

    Evidence, batch size, all tokens, one row, ranks above a side and the mean of probabilities rather than logits have tests
    of their own above and in the files beside this one.
    """

    def test_dropout_is_off_and_the_networks_mode_is_as_before(self, tiny_llama, tiny_tokenizer, three_topics):
        network = tiny_llama(torch.float64, attention_dropout=0.5)
        model = BayesianModel(Backbone(network, tiny_tokenizer, "tiny"), three_topics(), adapter=ADAPTERS)
        mode, estimate, names = network.training, somewhere(model), ("v_proj.lora_B",)
        first, again = (curvature(model, estimate, names, "kron")["v_proj.lora_B"] for _ in range(2))
        assert torch.equal(first.outputs, again.outputs), "dropout would draw other masks"
        assert network.training == mode

    def test_a_batch_costs_one_backward_less_than_classes_whatever_its_rows(self, model, monkeypatch):
        calls, real = [], torch.autograd.grad
        monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1])
        curvature(model, somewhere(model), tuple(model.sites), "kron", batch_size=12)
        assert len(calls) == 2
        calls.clear()
        LogitGradients(model, somewhere(model), tuple(model.sites)).jacobians(whole_batch(model), each_logit)
        assert len(calls) == 3

    def test_logits_meet_the_softmax_once(self, model):
        """Twice, probabilities would be near uniform and the Fisher information of the head near that of a coin."""
        estimate, batch = somewhere(model), whole_batch(model)
        logits, _ = explicit_jacobians(model, batch, estimate)
        probs = logits.softmax(-1)
        with torch.no_grad():
            model.row_logits(batch, estimate)
            features = model.backbone.features(batch).double()
            model.release()
        hessian = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None]
        wanted = torch.einsum("nij,na,nb->iajb", hessian, features, features).reshape(96, 96)
        found = curvature(model, estimate, ("head.weight",), "full")["head.weight"].total
        assert relative(found, wanted) < 1e-8
        twice = probs.softmax(-1)
        assert (twice - probs).abs().max() > 0.2
