"""PiSSA: identities in float64, PEFT as oracle, and the defects of PEFT and the official code that must not be here."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional

from pyrolora.guides import BLoB
from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import LoRA, PiSSA
from pyrolora.models.backbones import Backbone
from pyrolora.models.factorisation import balanced_factors, principal_factors, randomised_svd
from pyrolora.models.prior_declarations import Flat, Relative

IDS = torch.tensor([[5, 9, 17, 30], [40, 41, 42, 43]])
ROWS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture
def backbone(tiny_llama, tiny_tokenizer):
    return Backbone(tiny_llama(torch.float64), tiny_tokenizer, "tiny")


@pytest.fixture
def weight():
    return torch.randn(24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def change_of(adapter, sites, values, path, width):
    """The dense change of one projection."""
    delta = adapter.deltas(sites, values)[path]
    return delta(torch.eye(width, dtype=torch.float64)[None])[0].T


def random_draw(sites, *draws, scale=0.3):
    return {site.name: scale * torch.randn(*draws, *site.shape, dtype=torch.float64) for site in sites}


class TestFactors:
    @pytest.mark.parametrize("scaling", [0.5, 1.0, 2.0])
    def test_exact_factors_hold_the_largest_components_and_leave_the_rest(self, weight, scaling):
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        a, b = principal_factors(weight, 5, scaling)
        product = scaling * b @ a
        residual = weight - product
        torch.testing.assert_close(product, u[:, :5] * s[:5] @ vt[:5], atol=1e-12, rtol=0)
        torch.testing.assert_close(a @ a.mT, torch.diag(s[:5] / scaling), atol=1e-12, rtol=0)
        torch.testing.assert_close(b.mT @ b, torch.diag(s[:5] / scaling), atol=1e-12, rtol=0)
        assert torch.linalg.matrix_norm(residual, 2) == pytest.approx(float(s[5]), abs=1e-12)
        assert (u[:, :5].mT @ residual).abs().max() < 1e-12
        assert (residual @ vt[:5].mT).abs().max() < 1e-12

    def test_the_randomised_form_follows_its_generator_alone_and_converges(self, weight):
        def factors(iterations, seed):
            return principal_factors(
                weight, 5, 1.0, iterations=iterations, generator=torch.Generator().manual_seed(seed)
            )

        before = torch.get_rng_state()
        a, again = factors(2, 0)[0], factors(2, 0)[0]
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(a, again)
        assert not torch.equal(a, factors(2, 1)[0])
        s = torch.linalg.svdvals(weight)

        def captured(iterations):
            a, b = factors(iterations, 0)
            return float(torch.linalg.svdvals(b @ a).sum() / s[:5].sum())

        assert captured(0) < captured(2) <= captured(30) + 1e-12
        assert captured(30) == pytest.approx(1.0, abs=1e-9)

    def test_oversampling_beats_the_same_iterations_without_it(self, weight):
        exact = torch.linalg.svdvals(weight)[:5].sum()

        def lost(width):
            _, s, _ = randomised_svd(weight, width, 1, torch.Generator().manual_seed(0))
            return float(exact - s[:5].sum())

        assert 0 < lost(13) < 0.5 * lost(5)

    def test_balancing_keeps_the_product_and_equalises_the_factors(self):
        a, b = 100 * torch.randn(3, 10, dtype=torch.float64), 0.01 * torch.randn(8, 3, dtype=torch.float64)
        x, y = balanced_factors(a, b)
        torch.testing.assert_close(y @ x, b @ a, atol=1e-12, rtol=0)
        torch.testing.assert_close(x @ x.mT, y.mT @ y, atol=1e-12, rtol=0)
        again, _ = balanced_factors(1e3 * a, 1e-3 * b)
        torch.testing.assert_close(again.abs(), x.abs(), atol=1e-9, rtol=0)


class TestAgainstPEFT:
    def test_products_are_pefts(self, tiny_llama):
        network = tiny_llama(torch.float32)
        backbone = Backbone(network, None, "tiny")
        adapter = PiSSA(rank=4, alpha=8.0, targets=TARGETS)
        sites = adapter.sites(backbone, None)
        constants = adapter.constants(backbone, sites)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), init_lora_weights="pissa")
        peft = get_peft_model(copy.deepcopy(network), config)
        for site in sites:
            if not site.name.endswith("lora_A"):
                continue
            up = site.name.removesuffix("A") + "B"
            for entry, path in enumerate(site.modules):
                theirs = peft.get_submodule(f"base_model.model.{path}")
                ours = 2.0 * constants[f"{up}.start"][entry] @ constants[f"{site.name}.start"][entry]
                product = 2.0 * theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
                residual = network.get_submodule(path).weight - ours
                torch.testing.assert_close(ours, product, atol=1e-4, rtol=0)
                torch.testing.assert_close(residual, theirs.base_layer.weight, atol=1e-4, rtol=0)

    def test_training_follows_pefts_residual_form(self, backbone):
        adapter = PiSSA(rank=2, targets=["q_proj", "v_proj"])
        sites = adapter.sites(backbone, None)
        constants = adapter.constants(backbone, sites)
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
        # PEFT takes the decomposition in float32 only
        peft = get_peft_model(copy.deepcopy(backbone.network).float(), config).double()
        draw = {name: value.requires_grad_() for name, value in adapter.initial(backbone, sites).items()}
        ours = torch.optim.SGD(list(draw.values()), lr=0.05)
        theirs = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(5):
            backbone.bind(adapter.deltas(sites, {**constants, **draw}))
            pair = []
            for network, optimiser in ((backbone.network, ours), (peft, theirs)):
                optimiser.zero_grad()
                loss = functional.cross_entropy(
                    network(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
                )
                loss.backward()
                optimiser.step()
                pair.append(loss.item())
            losses.append(pair)
        assert losses[0][0] - losses[-1][0] > 0.05
        assert max(abs(ours - theirs) for ours, theirs in losses) < 1e-5

    def test_a_saved_posterior_is_a_lora_of_twice_the_rank_for_peft(self, three_topics_model, tiny_llama, tmp_path):
        model = three_topics_model(adapter=PiSSA(rank=2, targets=["q_proj", "down_proj"]), prior=Flat())
        posterior = MAP(steps=4, learning_rate=0.02).fit(model, model.task.train, progress=False)
        folder = posterior.save_pretrained(tmp_path / "pissa")
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (4, 4.0)
        peft = PeftModel.from_pretrained(tiny_llama(torch.float64), folder).double()
        ids = torch.tensor([[5, 9, 17, 30]])
        untouched = model.backbone.network(input_ids=ids).logits
        changes = model.adapters[0].deltas(tuple(model.adapter_sites.values()), {**model.constants, **posterior.mean()})
        model.backbone.bind(changes)
        ours = model.backbone.network(input_ids=ids).logits
        assert (ours - untouched).abs().max() > 0.01
        torch.testing.assert_close(peft(input_ids=ids).logits, ours, atol=1e-5, rtol=0)


class TestStart:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("form", ["difference", "fixed_B", "subspace"])
    @pytest.mark.parametrize("iterations", [None, 0])
    def test_nothing_changes_bit_by_bit(self, tiny_llama, dtype, form, iterations):
        backbone = Backbone(tiny_llama(dtype), None, "tiny")
        adapter = PiSSA(rank=4, targets=TARGETS, form=form, iterations=iterations)
        sites = adapter.sites(backbone, None)
        before = backbone.network(input_ids=IDS).logits
        weights = copy.deepcopy(backbone.network.state_dict())
        values = {**adapter.constants(backbone, sites), **adapter.initial(backbone, sites)}
        backbone.bind(adapter.deltas(sites, values))
        assert torch.equal(backbone.network(input_ids=IDS).logits, before)
        moved = {name: value + (0.3 if ".start" not in name else 0) for name, value in values.items()}
        backbone.bind(adapter.deltas(sites, moved))
        assert not torch.equal(backbone.network(input_ids=IDS).logits, before)
        backbone.release()
        assert torch.equal(backbone.network(input_ids=IDS).logits, before), "PEFT's disable_adapter runs the residual"
        after = backbone.network.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in weights.items())

    def test_the_product_does_not_depend_on_alpha(self, backbone):
        products = []
        for alpha in (2.0, 4.0, 8.0):
            adapter = PiSSA(rank=4, alpha=alpha, targets=["q_proj"])
            sites = adapter.sites(backbone, None)
            constants = adapter.constants(backbone, sites)
            a, b = constants["q_proj.lora_A.start"], constants["q_proj.lora_B.start"]
            products.append(adapter.scaling * b @ a)
        for product in products[1:]:
            torch.testing.assert_close(product, products[0], atol=1e-12, rtol=0)

    def test_alpha_defaults_to_the_rank_as_published(self):
        assert PiSSA(rank=16).scaling == 1.0
        assert PiSSA.from_dict(PiSSA(rank=16).to_dict()) == PiSSA(rank=16)


class TestChange:
    @pytest.mark.parametrize("draws", [(), (3,)])
    def test_it_is_the_difference_of_products(self, backbone, draws):
        adapter = PiSSA(rank=3, alpha=6.0, targets=["down_proj"])
        sites = adapter.sites(backbone, None)
        constants, draw = adapter.constants(backbone, sites), random_draw(sites, *draws)
        a0, b0 = constants["down_proj.lora_A.start"][1], constants["down_proj.lora_B.start"][1]
        delta = adapter.deltas(sites, {**constants, **draw})["model.layers.1.mlp.down_proj"]
        rows = torch.randn(max(1, *draws, 1), 4, 64, dtype=torch.float64)
        changed = delta(rows)
        for group in range(rows.shape[0]):
            one = {name: value[group] if draws else value for name, value in draw.items()}
            a, b = a0 + one["down_proj.lora_A"][1], b0 + one["down_proj.lora_B"][1]
            expected = rows[group] @ (2.0 * (b @ a - b0 @ a0)).T
            torch.testing.assert_close(changed[group], expected, atol=1e-12, rtol=0)

    @pytest.mark.parametrize("form", ["difference", "fixed_B", "subspace"])
    def test_conversion_to_a_plain_lora_keeps_every_draw(self, backbone, form):
        adapter = PiSSA(rank=3, alpha=6.0, targets=["down_proj"], form=form)
        sites = adapter.sites(backbone, None)
        constants, draw = adapter.constants(backbone, sites), random_draw(sites, 2)
        rank = 6 if form == "difference" else 3
        plain = LoRA(rank=rank, alpha=2.0 * rank, targets=["down_proj"])
        plain_sites = plain.sites(backbone, None)
        converted = adapter.as_lora(sites, draw, constants)
        assert {name: value.shape[1:] for name, value in converted.items()} == {s.name: s.shape for s in plain_sites}
        rows = torch.randn(2, 4, 64, dtype=torch.float64)
        for path, delta in adapter.deltas(sites, {**constants, **draw}).items():
            torch.testing.assert_close(
                plain.deltas(plain_sites, converted)[path](rows), delta(rows), atol=1e-12, rtol=0
            )

    def test_two_on_one_network_each_alone_and_together(self, three_topics_model):
        first, second = PiSSA(rank=2, name="first"), PiSSA(rank=3, name="second", iterations=2)
        both = three_topics_model(adapter=[first, second])
        alone = {name: three_topics_model(adapter=a) for name, a in (("first", first), ("second", second))}
        batch = next(iter(both.encode(both.task.train).batches(4)))
        draw = random_draw(tuple(both.sites.values()), scale=0.1)
        zero = {name: torch.zeros_like(value) for name, value in draw.items()}
        apart = {}
        for name, model in alone.items():
            own = {key: value for key, value in draw.items() if key.startswith(name)}
            apart[name] = model.logits(batch, own)
            assert torch.equal(both.logits(batch, {**zero, **own}), apart[name])
        together = both.logits(batch, draw)
        # both projections are adapted twice: the second must not replace the first
        assert (together - apart["first"]).abs().max() > 1e-3
        assert (together - apart["second"]).abs().max() > 1e-3

    @pytest.mark.parametrize("form", ["fixed_B", "subspace"])
    def test_blobs_exact_forms_leave_the_centre_where_it_is_for_every_b(self, backbone, form):
        adapter = PiSSA(rank=3, targets=["down_proj"], form=form)
        sites = adapter.sites(backbone, None)
        constants, draw = adapter.constants(backbone, sites), random_draw(sites)
        draw["down_proj.lora_A"] = torch.zeros_like(draw["down_proj.lora_A"])
        path = "model.layers.0.mlp.down_proj"
        assert not change_of(adapter, sites, {**constants, **draw}, path, 64).any()
        # the difference form's centre drifts with B, by s (B - B0) A0
        drifting = PiSSA(rank=3, targets=["down_proj"])
        draw = random_draw(drifting.sites(backbone, None))
        draw["down_proj.lora_A"] = torch.zeros_like(draw["down_proj.lora_A"])
        values = {**constants, **draw}
        drift = draw["down_proj.lora_B"][0] @ constants["down_proj.lora_A.start"][0]
        found = change_of(drifting, drifting.sites(backbone, None), values, path, 64)
        torch.testing.assert_close(found, drift, atol=1e-12, rtol=0)


class TestPrior:
    def test_its_mode_is_the_pretrained_network_and_not_the_residual(self, three_topics_model):
        model = three_topics_model(adapter=PiSSA(rank=4), prior=Relative(0.1))
        batch = next(iter(model.encode(model.task.train).batches(4)))
        draw = {
            name: (0.1 * torch.randn(s.shape, dtype=torch.float64)).requires_grad_() for name, s in model.sites.items()
        }
        optimiser = torch.optim.LBFGS(
            list(draw.values()), max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
        )

        def closure():
            optimiser.zero_grad()
            loss = -sum(model.prior(site).log_prob(draw[name]) for name, site in model.sites.items())
            loss.backward()
            return loss

        optimiser.step(closure)
        untouched = model.logits(batch, model.initial())
        torch.testing.assert_close(model.logits(batch, draw), untouched, atol=1e-6, rtol=0)
        residual = {name: -model.constants[f"{name}.start"] for name in model.sites}
        assert (model.logits(batch, residual) - untouched).abs().max() > 0.1

    @pytest.mark.parametrize("form", ["difference", "fixed_B", "subspace"])
    def test_relative_scales_give_the_declared_change(self, backbone, form):
        adapter, ratio = PiSSA(rank=4, alpha=8.0, targets=["down_proj"], form=form), 0.02
        sites = adapter.sites(backbone, None)
        constants = adapter.constants(backbone, sites)
        scales = adapter.relative_scales(backbone, sites, constants, ratio)
        draws, path, total = 400, "model.layers.2.mlp.down_proj", 0.0
        draw = {s.name: scales[s.name] * torch.randn(draws, *s.shape, dtype=torch.float64) for s in sites}
        delta = adapter.deltas(sites, {**constants, **draw})[path]
        eye = torch.eye(64, dtype=torch.float64)[None].repeat(draws, 1, 1)
        total = delta(eye).square().sum((1, 2)).mean()
        norm = backbone.network.get_submodule(path).weight.square().sum()
        # 400 sums of at least 256 squares each: the relative standard error is below 0.45 %, so five of them is a failure
        # rate below 1e-6; the second-order term adds ratio^2 relative
        assert float((total / norm).sqrt()) == pytest.approx(ratio, rel=0.025)

    @pytest.mark.parametrize("tau", [0.01, 0.3])
    def test_a_change_under_an_isotropic_prior_is_as_large_as_its_closed_form(self, backbone, tau):
        """``s^2 (tau^2 (n |B0|^2 + m |A0|^2) + tau^4 r m n)``; the wider prior is mostly its last term."""
        adapter = PiSSA(rank=4, alpha=8.0, targets=["down_proj"])
        sites = adapter.sites(backbone, None)
        constants = adapter.constants(backbone, sites)
        centres = adapter.centres(sites, constants)
        a, b = (centres[f"down_proj.lora_{factor}"][2] for factor in "AB")
        (rank, columns), rows = a.shape, b.shape[0]
        linear = tau**2 * float(columns * b.square().sum() + rows * a.square().sum())
        expected = 2.0**2 * (linear + tau**4 * rank * rows * columns)
        draw = {s.name: tau * torch.randn(400, *s.shape, dtype=torch.float64) for s in sites}
        delta = adapter.deltas(sites, {**constants, **draw})["model.layers.2.mlp.down_proj"]
        eye = torch.eye(columns, dtype=torch.float64)[None].repeat(400, 1, 1)
        sizes = delta(eye).square().sum((1, 2))
        # six standard errors of 400 draws: a failure rate below 1e-8
        assert abs(float(sizes.mean()) - expected) < 6 * float(sizes.std()) / 20
        assert float(sizes.std()) / 20 < 0.01 * expected

    def test_scales_are_whitened_over_components(self, backbone):
        adapter = PiSSA(rank=4, alpha=8.0, targets=["q_proj"])
        sites = adapter.sites(backbone, None)
        scales = adapter.relative_scales(backbone, sites, adapter.constants(backbone, sites), 0.1)
        weight = backbone.network.get_submodule("model.layers.0.self_attn.q_proj").weight
        s = torch.linalg.svdvals(weight)[:4]
        tau = 0.1 * torch.linalg.matrix_norm(weight) / (2.0 * (4 * 64) ** 0.5)
        torch.testing.assert_close(scales["q_proj.lora_A"][0, :, 0], tau / (s / 2.0).sqrt(), atol=1e-12, rtol=0)
        torch.testing.assert_close(scales["q_proj.lora_B"][0, 0], tau / (s / 2.0).sqrt(), atol=1e-12, rtol=0)


class TestReload:
    @pytest.mark.parametrize("iterations", [None, 2])
    def test_on_the_base_it_is_bit_exact_and_no_decomposition_is_made(
        self, three_topics_model, tmp_path, monkeypatch, iterations
    ):
        adapter = PiSSA(rank=2, iterations=iterations)
        model = three_topics_model(adapter=adapter, prior=Relative(0.1))
        fitted = SVI(guide=BLoB(), steps=3).fit(model, model.task.train, progress=False)
        folder = fitted.save_pretrained(tmp_path / "posterior")
        constants = model.constants
        fresh = three_topics_model(adapter=adapter, prior=Relative(0.1))
        # as if another machine's decomposition had come out with other signs
        fresh.constants = {name: -value for name, value in fresh.constants.items()}
        monkeypatch.setattr(torch.linalg, "svd", None)
        again = Posterior.from_pretrained(folder, model=fresh)
        assert all(torch.equal(again.model.constants[name], value) for name, value in constants.items())
        generator = torch.Generator().manual_seed
        expected = fitted.predict(model.task.test, draws=3, generator=generator(0)).probs
        assert torch.equal(again.predict(model.task.test, draws=3, generator=generator(0)).probs, expected)
        assert not torch.equal(fresh.constants["q_proj.lora_A.start"], again.model.constants["q_proj.lora_A.start"])


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rank": 17, "targets": ["v_proj"]}, "Rank 17 exceeds the smaller side of v_proj"),
            ({"form": "diference"}, "Unknown form 'diference'. Did you mean 'difference'"),
            ({"iterations": -1}, "iterations must not be negative; got -1"),
            ({"targets": ["lm_head"]}, "'lm_head' of tiny does not exist in its blocks"),
            ({"targets": ["embed_tokens"]}, "'embed_tokens' of tiny does not exist in its blocks"),
            ({"alpha": -1.0}, "alpha must be positive"),
        ],
    )
    def test_what_came_what_was_expected(self, backbone, settings, message):
        with pytest.raises(ValueError) as refused:  # noqa: PT011 - the message is checked below
            PiSSA(**settings).sites(backbone, None)
        assert message in str(refused.value)

    def test_constants_of_another_adapter(self, three_topics_model):
        model = three_topics_model(adapter=PiSSA(rank=2))
        with pytest.raises(ValueError, match=r"PiSSA needs the constant 'q_proj.lora_A.start'"):
            type(model)(model.backbone, model.task, PiSSA(rank=2), constants={})


class TestSharing:
    def test_models_of_one_backbone_and_adapter_decompose_once(self, three_topics_model, monkeypatch):
        first = three_topics_model(adapter=PiSSA(rank=2))
        calls = []
        svd = torch.linalg.svd
        monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or svd(*a, **k))

        def again(adapter):
            return type(first)(first.backbone, first.task, adapter)

        second = again([PiSSA(rank=2)])
        assert not calls
        assert second.constants["q_proj.lora_A.start"] is first.constants["q_proj.lora_A.start"]
        again(PiSSA(rank=3))
        assert len(calls) == 6
        with torch.no_grad():
            first.backbone.network.get_submodule("model.layers.0.self_attn.q_proj").weight.mul_(2)
        changed = again(PiSSA(rank=2))
        assert len(calls) == 12
        ratio = changed.constants["q_proj.lora_A.start"][0].norm() / first.constants["q_proj.lora_A.start"][0].norm()
        assert float(ratio) == pytest.approx(2**0.5)
