"""CorDA: identities in float64, PEFT as oracle, and the defects of PEFT and the official code that must not be here."""

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda

from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.models.adapters import CorDA, LoRA, PiSSA
from pyrolora.models.backbones import Backbone
from pyrolora.models.factorisation import context_factors, damped_inverse, principal_factors
from pyrolora.models.moments import SecondMoments, second_moments
from pyrolora.models.prior_declarations import Flat, Relative
from pyrolora.models.program import BayesianModel

TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture
def backbone(tiny_llama, tiny_tokenizer):
    return Backbone(tiny_llama(torch.float64), tiny_tokenizer, "tiny")


@pytest.fixture
def weight():
    return torch.randn(24, 40, dtype=torch.float64)


@pytest.fixture
def moment():
    rows = torch.randn(400, 40, dtype=torch.float64) * torch.logspace(0, -1.5, 40, dtype=torch.float64)
    return rows.mT @ rows / 400


def text_batches(lengths, size, pad_side="left", seed=0):
    """Random rows of the given lengths, padded in batches of ``size``."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 128, (length,), generator=generator) for length in lengths]
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        longest = max(len(row) for row in some)
        ids, mask = (
            torch.zeros(len(some), longest, dtype=torch.int64),
            torch.zeros(len(some), longest, dtype=torch.int64),
        )
        for index, row in enumerate(some):
            where = slice(longest - len(row), None) if pad_side == "left" else slice(0, len(row))
            ids[index, where], mask[index, where] = row, 1
        yield {"input_ids": ids, "attention_mask": mask}


def factors(weight, moment, rank=5, scaling=2.0, leading=True, damping=0.01, balanced=False):
    return context_factors(weight, moment, rank, scaling, leading=leading, damping=damping, balanced=balanced)


class TestMoments:
    LENGTHS = (3, 9, 5, 12, 7, 4, 11, 6, 8)
    PATHS = ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.2.mlp.down_proj")

    def one_shot(self, backbone, path):
        caught = []
        module = backbone.network.get_submodule(path)
        handle = module.register_forward_pre_hook(lambda _, args: caught.append(args[0][0].detach()))
        for batch in text_batches(self.LENGTHS, 1):
            backbone.network(**batch)
        handle.remove()
        rows = torch.cat(caught)
        return rows.mT @ rows / len(rows)

    @pytest.mark.parametrize("size", [1, 4, 9])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_streamed_over_any_batches_it_is_the_one_shot_mean_and_padding_is_not_in_it(self, backbone, size, side):
        # PEFT's collector takes one row at a time and counts its padding
        found = second_moments(backbone, text_batches(self.LENGTHS, size, side), self.PATHS)
        assert found.tokens == sum(self.LENGTHS)
        for path in self.PATHS:
            torch.testing.assert_close(found[path], self.one_shot(backbone, path), atol=1e-10, rtol=0)

    def test_the_diagonal_alone(self, backbone):
        whole = second_moments(backbone, text_batches(self.LENGTHS, 4), self.PATHS)
        found = second_moments(backbone, text_batches(self.LENGTHS, 4), self.PATHS, diagonal=True)
        for path in self.PATHS:
            torch.testing.assert_close(found[path], whole[path].diagonal(), atol=1e-12, rtol=0)

    def test_projections_that_read_the_same_share_one_matrix_in_memory_and_on_disk(
        self, backbone, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        found = second_moments(backbone, text_batches(self.LENGTHS, 4), self.PATHS)
        assert found[self.PATHS[0]] is found[self.PATHS[1]]
        # no folder of its own is needed, which PEFT's os.makedirs("") trips over
        file = found.save("moments.safetensors")
        assert file.stat().st_size < 8 * (32**2 + 64**2) + 4000
        again = SecondMoments.load(file)
        assert again.tokens == found.tokens
        assert all(torch.equal(again[path], found[path]) for path in self.PATHS)

    def test_float32_products_over_a_bfloat16_backbone(self, tiny_llama):
        half = Backbone(tiny_llama(torch.bfloat16), None, "tiny")
        found = second_moments(half, text_batches(self.LENGTHS, 4), self.PATHS)
        assert found[self.PATHS[2]].dtype == torch.float32
        assert second_moments(half, text_batches(self.LENGTHS, 4), self.PATHS, dtype=torch.float64)[
            self.PATHS[0]
        ].dtype == (torch.float64)

    def test_refusals(self, backbone, tmp_path):
        found = second_moments(backbone, text_batches(self.LENGTHS, 4), self.PATHS)
        with pytest.raises(KeyError, match=r"k_proj' was collected. Did you mean 'model.layers.1"):
            found["model.layers.1.self_attn.k_proj"]
        with pytest.raises(ValueError, match="no token to average over"):
            second_moments(backbone, [], self.PATHS)
        (tmp_path / "x.safetensors").write_bytes(b"nothing")
        with pytest.raises(ValueError, match="holds no second moments"):
            SecondMoments.load(tmp_path / "x.safetensors")
        with pytest.raises(FileNotFoundError, match="No second moments"):
            SecondMoments.load(tmp_path / "y.safetensors")


class TestFactors:
    @pytest.mark.parametrize("balanced", [False, True])
    def test_all_components_give_the_weight_back(self, weight, moment, balanced):
        a, b = factors(weight, moment, rank=24, balanced=balanced)
        torch.testing.assert_close(2.0 * b @ a, weight, atol=1e-10, rtol=0)

    @pytest.mark.parametrize("leading", [True, False])
    def test_the_chosen_part_has_the_norm_of_its_singular_values_and_is_the_best_or_the_least(
        self, weight, moment, leading
    ):
        a, b = factors(weight, moment, leading=leading)
        damped, _ = damped_inverse(moment, 0.01)
        s = torch.linalg.svdvals(weight @ damped)
        chosen = s[:5] if leading else s[-5:]
        product = 2.0 * b @ a @ damped
        torch.testing.assert_close(torch.linalg.matrix_norm(product), chosen.square().sum().sqrt(), atol=1e-10, rtol=0)
        # Eckart and Young: what is left over is as small (or as large) as the spectrum allows
        rest = torch.linalg.matrix_norm(weight @ damped - product)
        others = s[5:] if leading else s[:-5]
        torch.testing.assert_close(rest, others.square().sum().sqrt(), atol=1e-10, rtol=0)

    def test_no_correlation_makes_it_pissa(self, weight):
        eye = torch.eye(40, dtype=torch.float64)
        a, b = factors(weight, eye)
        x, y = principal_factors(weight, 5, 2.0)
        torch.testing.assert_close(b @ a, y @ x, atol=1e-10, rtol=0)
        # damping makes C 1.01 times the identity, and the published factors keep that in their ratio
        torch.testing.assert_close(a @ a.mT, x @ x.mT / 1.01, atol=1e-10, rtol=0)
        a, _ = factors(weight, eye, balanced=True)
        torch.testing.assert_close(a @ a.mT, x @ x.mT, atol=1e-10, rtol=0)

    @pytest.mark.parametrize("leading", [True, False])
    def test_the_scale_of_the_moment_is_a_gauge_that_balancing_removes(self, weight, moment, leading):
        def pair(factor, balanced):
            return factors(weight, factor * moment, leading=leading, balanced=balanced)

        (a, b), (c, d) = pair(1.0, False), pair(100.0, False)
        torch.testing.assert_close(d @ c, b @ a, atol=1e-9, rtol=0)
        ratio = (c.norm() / d.norm()) / (a.norm() / b.norm())
        assert float(ratio) == pytest.approx(0.01, rel=1e-9)
        (a, b), (c, d) = pair(1.0, True), pair(100.0, True)
        torch.testing.assert_close(c @ c.mT, a @ a.mT, atol=1e-9, rtol=0)
        assert float(a.norm() / b.norm()) == pytest.approx(1.0, rel=1e-9)

    def test_too_little_text_is_damped_until_there_is_an_inverse(self, weight):
        rows = torch.randn(3, 40, dtype=torch.float64)
        for moment in (rows.mT @ rows / 3, 1e12 * rows.mT @ rows, 1e-12 * rows.mT @ rows):
            for leading in (True, False):
                a, b = factors(weight, moment, leading=leading, balanced=True)
                assert a.isfinite().all()
                assert b.isfinite().all()
        hopeless = torch.diag(torch.tensor([1.0, -1.0] * 10 + [2.0] * 20, dtype=torch.float64))
        damped, inverse = damped_inverse(hopeless, 0.01)
        assert (damped @ inverse - torch.eye(40)).norm() < 0.05
        with pytest.raises(ValueError, match="must be positive and finite"):
            damped_inverse(torch.zeros(4, 4), 0.01)

    def test_on_held_out_inputs_it_loses_less_than_the_plain_decomposition_and_more_than_the_root(self):
        # activations that live in a few directions, weights that do not know it
        generator = torch.Generator().manual_seed(1)
        basis = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))[0]
        spread = torch.logspace(0, -2, 40, dtype=torch.float64)
        train, held_out = (
            torch.randn(500, 40, generator=generator, dtype=torch.float64) * spread @ basis for _ in "ab"
        )
        weight = torch.randn(24, 40, generator=generator, dtype=torch.float64)
        a, b = factors(weight, train.mT @ train / 500, rank=12, leading=True)
        x, y = principal_factors(weight, 12, 2.0)

        def lost(product):
            return float(torch.linalg.matrix_norm(held_out @ (weight - 2.0 * product).T))

        assert lost(b @ a) < 0.5 * lost(y @ x)
        # of one weight the root of the moment is the optimum for the outputs, so it loses no more than the moment itself
        values, vectors = torch.linalg.eigh(train.mT @ train / 500)
        c, d = factors(weight, vectors * values.clamp_min(0).sqrt() @ vectors.mT, rank=12, leading=True)
        assert lost(d @ c) < lost(b @ a)


class TestAgainstPEFT:
    @pytest.mark.parametrize(("mode", "method"), [("instruction", "ipm"), ("knowledge", "kpm")])
    def test_products_are_pefts_up_to_its_float32(self, tiny_llama, mode, method, tmp_path):
        backbone = Backbone(tiny_llama(torch.float32), None, "tiny")
        (row,) = text_batches([60], 1)
        adapter = CorDA(rank=4, alpha=4.0, targets=TARGETS, mode=mode, calibration="unused", balanced=False)
        sites = adapter.sites(backbone, None)
        paths = [path for site in sites[::2] for path in site.modules]
        moments = second_moments(backbone, [row], paths)
        weights = {path: backbone.network.get_submodule(path).weight.detach() for path in paths}
        found = adapter.factors_from(moments, weights)
        config = LoraConfig(
            r=4, lora_alpha=4, target_modules=list(TARGETS), init_lora_weights="corda",
            corda_config=CordaConfig(corda_method=method),
        )  # fmt: skip
        twin = copy.deepcopy(backbone.network)
        preprocess_corda(twin, config, run_model=lambda: twin(input_ids=row["input_ids"]))
        for path in paths:
            theirs = twin.get_submodule(path).eigens
            product = theirs.U_WC * theirs.S_WC @ theirs.V_WC.T
            a, b = found[path]
            error = torch.linalg.matrix_norm(b @ a - product) / torch.linalg.matrix_norm(product)
            assert error < 3e-4, (path, float(error))


class TestAdapter:
    def test_it_calibrates_on_the_models_own_prompts(self, three_topics_model):
        model = three_topics_model(adapter=CorDA(rank=2, targets=["q_proj"], samples=500))
        path = "model.layers.0.self_attn.q_proj"
        moments = second_moments(model.backbone, model.encode(model.task.train).batches(3), [path])
        weight = model.backbone.network.get_submodule(path).weight
        a, b = factors(weight, moments[path], rank=2, scaling=1.0, balanced=True)
        found = model.constants["q_proj.lora_B.start"][0] @ model.constants["q_proj.lora_A.start"][0]
        torch.testing.assert_close(found, b @ a, atol=1e-9, rtol=0)

    def test_text_files_and_kept_moments_calibrate_it_as_well(self, three_topics_model, tmp_path):
        text = tmp_path / "notes.txt"
        text.write_text("the dog is happy and the cat is not . a man and a woman drive to the city ! " * 40)
        settings = {"mode": "knowledge", "rank": 2, "targets": ("q_proj", "down_proj")}
        model = three_topics_model(adapter=CorDA(calibration=str(text), tokens=32, samples=10, **settings))
        adapter = model.adapters[0]
        paths = [path for site in model.adapter_sites.values() for path in site.modules]
        file = str(adapter.moments(model.backbone, paths).save(tmp_path / "moments.safetensors"))
        again = three_topics_model(adapter=CorDA(calibration=file, **settings))
        for name, value in model.constants.items():
            torch.testing.assert_close(again.constants[name], value, atol=1e-12, rtol=0)
        # one collection serves every rank and both modes
        larger = three_topics_model(adapter=CorDA(calibration=file, **(settings | {"rank": 4, "mode": "instruction"})))
        assert larger.constants["q_proj.lora_A.start"].shape == (3, 4, 32)

    def test_another_prompt_of_the_same_task_makes_other_constants(self, three_topics_model):
        """One backbone, one name, the same examples: what the calibration reads is the prompts."""
        adapter = CorDA(mode="instruction", rank=2, targets=("q_proj",))
        first = three_topics_model(adapter=adapter)
        shape = dataclasses.replace(first.task.format, template="question : {text} answer :")
        other = BayesianModel(first.backbone, dataclasses.replace(first.task, format=shape), adapter=adapter)
        name = "q_proj.lora_A.start"
        assert (first.constants[name] - other.constants[name]).abs().max() > 1e-3

    @pytest.mark.parametrize("mode", ["instruction", "knowledge"])
    def test_the_start_changes_nothing_and_training_does(self, three_topics_model, tmp_path, mode):
        text = tmp_path / "notes.txt"
        text.write_text("the dog is happy and the cat is not . " * 40)
        adapter = CorDA(rank=2, mode=mode, calibration=str(text))
        model = three_topics_model(adapter=adapter, prior=Flat())
        batch = next(iter(model.encode(model.task.train).batches(4)))
        plain = three_topics_model(adapter=LoRA(rank=2))
        untouched = plain.logits(batch, plain.initial())
        assert torch.equal(model.logits(batch, model.initial()), untouched)
        posterior = MAP(steps=3).fit(model, model.task.train, progress=False)
        assert not torch.equal(model.logits(batch, posterior.mean()), untouched)

    def test_several_adapters_come_from_one_collection(self, backbone):
        # PEFT divides its kept decomposition in place and deletes it: one adapter for each collection
        adapter = CorDA(rank=2, targets=["q_proj"], calibration="unused")
        paths = ["model.layers.0.self_attn.q_proj"]
        moments = second_moments(backbone, text_batches([20, 30], 2), paths)
        kept = moments[paths[0]].clone()
        weights = {path: backbone.network.get_submodule(path).weight.detach() for path in paths}
        first, second = adapter.factors_from(moments, weights), adapter.factors_from(moments, weights)
        assert torch.equal(first[paths[0]][0], second[paths[0]][0])
        assert torch.equal(moments[paths[0]], kept)

    def test_reloading_needs_no_calibration_text(self, three_topics_model, tmp_path):
        text = tmp_path / "notes.txt"
        text.write_text("the dog is happy and the cat is not . " * 40)
        adapter = CorDA(rank=2, mode="knowledge", calibration=str(text))
        model = three_topics_model(adapter=adapter, prior=Relative(0.1))
        posterior = MAP(steps=2).fit(model, model.task.train, progress=False)
        folder = posterior.save_pretrained(tmp_path / "posterior")
        text.unlink()
        bare = type(model)(
            model.backbone, model.task, adapter, Relative(0.1), num_data=model.num_data,
            constants={name: 0 * value for name, value in model.constants.items()},
        )  # fmt: skip
        again = Posterior.from_pretrained(folder, model=bare)
        assert torch.equal(again.predict(model.task.test).probs, posterior.predict(model.task.test).probs)

    def test_the_prior_bounds_the_change_whatever_the_imbalance(self, three_topics_model):
        """The published factors differ a hundredfold in size; whitened scales give both the same change."""
        ratio, found = 0.05, []
        for balanced in (True, False):
            adapter = CorDA(rank=4, targets=["down_proj"], balanced=balanced)
            model = three_topics_model(adapter=adapter)
            scales = adapter.relative_scales(
                model.backbone, tuple(model.adapter_sites.values()), model.constants, ratio
            )
            draw = {
                name: scales[name] * torch.randn(200, *site.shape, dtype=torch.float64)
                for name, site in model.adapter_sites.items()
            }
            path = "model.layers.1.mlp.down_proj"
            delta = adapter.deltas(tuple(model.adapter_sites.values()), {**model.constants, **draw})[path]
            change = delta(torch.eye(64, dtype=torch.float64)[None].repeat(200, 1, 1)).square().sum((1, 2)).mean()
            found.append(float((change / model.backbone.network.get_submodule(path).weight.square().sum()).sqrt()))
        # 200 sums of at least 128 squares: relative standard error below 0.7 %, five of them and the second order in 5 %
        assert found == pytest.approx([ratio, ratio], rel=0.05)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"mode": "kpm"}, "Unknown mode 'kpm'"),
            ({"mode": "knowledge"}, 'Name other text, as in calibration="notes.txt"'),
            ({"samples": 0}, "samples must be at least 1"),
            ({"damping": 0.0}, "damping must be positive"),
            ({"calibration": "bbc_headlnes"}, "neither a file nor a task. Did you mean 'bbc_headlines'"),
        ],
    )
    def test_refusals(self, three_topics_model, settings, message):
        with pytest.raises(ValueError) as refused:  # noqa: PT011 - the message is checked below
            three_topics_model(adapter=CorDA(rank=2, **settings))
        assert message in str(refused.value)

    def test_pissa_and_corda_agree_on_everything_but_the_factors(self):
        assert CorDA.from_dict(CorDA(rank=4).to_dict()) == CorDA(rank=4)
        assert CorDA(rank=4).scaling == PiSSA(rank=4).scaling == 1.0
