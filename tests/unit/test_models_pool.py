"""The pool of LoRAs: identities in float64, its members as `PiSSA`, merging by products, exact trimming."""

import copy
import json

import pytest
import torch
from peft import PeftModel

from pyrolora.guides import BLoB, Point, build_guide
from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import LoRAPool, PiSSA
from pyrolora.models.backbones import Backbone
from pyrolora.models.merging import MergeRule, class_scores
from pyrolora.models.prior_declarations import Relative
from pyrolora.models.serving import merged, weight_change
from pyrolora.models.trimming import Trim, trimmed

IDS = torch.tensor([[5, 9, 17, 30], [40, 41, 42, 43]])
ROWS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
TARGETS = ("q_proj", "v_proj", "down_proj")
POOL = LoRAPool(members=3, rank=2, targets=TARGETS)


@pytest.fixture
def backbone(tiny_llama, tiny_tokenizer):
    return Backbone(tiny_llama(torch.float64), tiny_tokenizer, "tiny")


@pytest.fixture
def built(backbone):
    sites = POOL.sites(backbone, None)
    return backbone, sites, POOL.constants(backbone, sites)


def random_draw(sites, *draws, scale=0.3):
    return {site.name: scale * torch.randn(*draws, *site.shape, dtype=torch.float64) for site in sites}


def slice_of(member, draw, rank=2):
    """The factors of one member."""
    along = slice(member * rank, (member + 1) * rank)
    return {
        name: value[..., along, :] if name.endswith("lora_A") else value[..., along] for name, value in draw.items()
    }


def dense_changes(adapter, sites, values, backbone):
    return {
        path: weight_change(delta, backbone.network.get_submodule(path).weight)
        for path, delta in adapter.deltas(sites, values).items()
    }


class TestStart:
    def test_factors_are_balanced_and_leave_the_residual_without_them(self, built):
        backbone, sites, constants = built
        for site in sites[::2]:
            a0, b0 = constants[f"{site.name}.start"], constants[f"{site.name.replace('_A', '_B')}.start"]
            for entry, path in enumerate(site.modules):
                weight = backbone.network.get_submodule(path).weight
                s = torch.linalg.svdvals(weight)
                residual = weight - b0[entry] @ a0[entry]
                torch.testing.assert_close(residual + b0[entry] @ a0[entry], weight, atol=1e-12, rtol=0)
                for gram in (a0[entry] @ a0[entry].T, b0[entry].T @ b0[entry]):
                    torch.testing.assert_close(gram, torch.diag(s[:2]), atol=1e-12, rtol=0)
                assert (b0[entry].T @ residual).abs().max() < 1e-12
                assert float(torch.linalg.matrix_norm(residual, 2)) == pytest.approx(float(s[2]), abs=1e-12)
                assert torch.linalg.matrix_rank(residual) == min(weight.shape) - 2

    def test_blocks_of_a_fused_weight_are_split_as_separate_projections_are(self, tiny_vision):
        """A network that fuses queries, keys and values has them as blocks of one weight, each with factors of its own."""
        backbone, rank, kinds = tiny_vision(torch.float64), 3, ("q_proj", "k_proj", "v_proj")
        adapter = PiSSA(rank=rank, targets=kinds)
        sites = {site.name: site for site in adapter.sites(backbone, None)}
        constants = adapter.constants(backbone, list(sites.values()))
        changes = dense_changes(adapter, list(sites.values()), {**constants, **random_draw(sites.values())}, backbone)
        for entry in range(2):
            paths = [sites[f"{kind}.lora_A"].modules[entry] for kind in kinds]
            fused = torch.cat([backbone.network.get_submodule(path).weight for path in paths])
            started = torch.cat(
                [constants[f"{kind}.lora_B.start"][entry] @ constants[f"{kind}.lora_A.start"][entry] for kind in kinds]
            )
            blocks = [torch.linalg.svd(block, full_matrices=False) for block in fused.split(len(fused) // 3)]
            largest = torch.cat([(u[:, :rank] * s[:rank]) @ vt[:rank] for u, s, vt in blocks])
            torch.testing.assert_close(started, largest, atol=1e-12, rtol=0)
            # one decomposition of the whole would be another start, of a third of the rank
            u, s, vt = torch.linalg.svd(fused, full_matrices=False)
            assert ((u[:, :rank] * s[:rank]) @ vt[:rank] - started).abs().max() > 0.01
            # a change has its start taken off; with it there is the product B A of each block
            change = started + torch.cat([changes[path] for path in paths])
            assert torch.linalg.matrix_rank(change) == 3 * rank


class TestMerge:
    def test_it_is_the_weighted_sum_of_products(self, built):
        backbone, sites, constants = built
        draw, weights = random_draw(sites), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        found = dense_changes(POOL, sites, {**constants, **draw, "pool.weights": weights}, backbone)
        for site in sites[::2]:
            up = site.name.replace("_A", "_B")
            for entry, path in enumerate(site.modules):
                a0, b0 = constants[f"{site.name}.start"][entry], constants[f"{up}.start"][entry]
                expected = -b0 @ a0
                for member, weight in enumerate(weights):
                    own = slice_of(member, draw)
                    expected = expected + weight * (b0 + own[up][entry]) @ (a0 + own[site.name][entry])
                torch.testing.assert_close(found[path], expected, atol=1e-12, rtol=0)

    @pytest.mark.parametrize("member", range(3))
    def test_one_hot_weights_are_that_member_alone(self, built, member):
        backbone, sites, constants = built
        draw, weights = random_draw(sites), torch.eye(3, dtype=torch.float64)[member]
        alone = PiSSA(rank=2, targets=TARGETS)
        assert POOL.member == alone
        backbone.bind(POOL.deltas(sites, {**constants, **draw, "pool.weights": weights}))
        found = backbone.hidden_states(ROWS)
        backbone.bind(alone.deltas(alone.sites(backbone, None), {**constants, **slice_of(member, draw)}))
        torch.testing.assert_close(found, backbone.hidden_states(ROWS), atol=1e-12, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_members_at_the_start_are_the_frozen_network_whatever_the_weights(self, tiny_llama, tiny_tokenizer, dtype):
        backbone = Backbone(tiny_llama(dtype), tiny_tokenizer, "tiny")
        sites = POOL.sites(backbone, None)
        start = {**POOL.constants(backbone, sites), **POOL.initial(backbone, sites)}
        before = backbone.hidden_states(ROWS)
        backbone.bind(POOL.deltas(sites, {**start, "pool.weights": torch.tensor([0.2, 0.7, 0.1], dtype=dtype)}))
        assert torch.equal(backbone.hidden_states(ROWS), before)

    def test_members_that_are_alike_are_one_member_whatever_the_weights(self, built):
        backbone, sites, constants = built
        one = slice_of(0, random_draw(sites))
        draw = {
            name: value.repeat(1, 3, 1) if name.endswith("_A") else value.repeat(1, 1, 3) for name, value in one.items()
        }
        alone = PiSSA(rank=2, targets=TARGETS)
        expected = dense_changes(alone, alone.sites(backbone, None), {**constants, **one}, backbone)
        weights = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
        found = dense_changes(POOL, sites, {**constants, **draw, "pool.weights": weights}, backbone)
        for path, change in found.items():
            torch.testing.assert_close(change, expected[path], atol=1e-12, rtol=0)

    def test_the_mean_of_factors_is_another_matrix(self, built):
        backbone, sites, constants = built
        draw, weights = random_draw(sites), torch.full((3,), 1 / 3, dtype=torch.float64)
        found = dense_changes(POOL, sites, {**constants, **draw, "pool.weights": weights}, backbone)
        slices = [slice_of(member, draw) for member in range(3)]
        mean = {name: sum(one[name] for one in slices) / 3 for name in draw}
        alone = PiSSA(rank=2, targets=TARGETS)
        averaged = dense_changes(alone, alone.sites(backbone, None), {**constants, **mean}, backbone)
        assert all((found[path] - averaged[path]).abs().max() > 1e-2 for path in found)

    def test_runs_of_rows_have_weights_of_their_own_and_draws_too(self, built):
        backbone, sites, constants = built
        draw = random_draw(sites, 2)
        weights = torch.rand(4, 3, dtype=torch.float64)
        weights = weights / weights.sum(-1, keepdim=True)
        ids = IDS.repeat(4, 1)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        backbone.bind(POOL.deltas(sites, {**constants, **draw, "pool.weights": weights}))
        found = backbone.hidden_states(batch)
        for run in range(4):
            one = {name: value[run // 2] for name, value in draw.items()}
            backbone.bind(POOL.deltas(sites, {**constants, **one, "pool.weights": weights[run]}))
            torch.testing.assert_close(found[2 * run : 2 * run + 2], backbone.hidden_states(ROWS), atol=1e-12, rtol=0)

    def test_merging_and_taking_out_again_leaves_every_bit(self, three_topics_model):
        model = three_topics_model(torch.float32, adapter=POOL)
        before = copy.deepcopy(model.backbone.network.state_dict())
        draw = {name: 0.3 * torch.randn(site.shape) for name, site in model.sites.items()}
        batch = next(iter(model.encode(model.task.test).batches(4)))
        bound = model.row_logits(batch, draw)
        with merged(model, draw):
            changed = [
                name
                for name, value in model.backbone.network.state_dict().items()
                if not torch.equal(value, before[name])
            ]
            assert len(changed) == 9
            torch.testing.assert_close(model.head(batch, (), None, 0), bound, atol=2e-5, rtol=1e-4)
        after = model.backbone.network.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_its_adapter_file_loads_in_peft(self, three_topics_model, tmp_path):
        model = three_topics_model(torch.float64, adapter=POOL)
        posterior = MAP(steps=1).fit(model, model.task.train, progress=False)
        with torch.no_grad():
            for parameter in posterior.guide.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        folder = posterior.save_pretrained(tmp_path / "pool")
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8
        model.backbone.bind(model.deltas(posterior.mean()))
        expected = model.backbone.hidden_states(ROWS)
        model.release()
        network = PeftModel.from_pretrained(copy.deepcopy(model.backbone.network), folder)
        found = network.base_model.model.model(**ROWS).last_hidden_state
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


class TestModel:
    def test_weights_with_a_prior_are_a_site_on_the_simplex(self, three_topics_model, tmp_path):
        pool = LoRAPool(members=3, rank=2, concentration=2.0, targets=TARGETS)
        model = three_topics_model(torch.float32, adapter=pool)
        posterior = SVI(guide=BLoB(), steps=3, learning_rate=0.1).fit(model, model.task.train, progress=False)
        weights = posterior.mean()["pool.weights"]
        assert float(weights.sum()) == pytest.approx(1.0, abs=1e-6)
        assert not torch.equal(weights, torch.full((3,), 1 / 3))
        again = Posterior.from_pretrained(posterior.save_pretrained(tmp_path / "pool"), model=model)
        assert torch.equal(again.mean()["pool.weights"], weights)

    def test_relative_scales_are_those_of_each_member(self, three_topics_model):
        model = three_topics_model(torch.float64, adapter=POOL, prior=Relative(0.1))
        alone = three_topics_model(torch.float64, adapter=POOL.member, prior=Relative(0.1))
        for name, site in alone.sites.items():
            own = model.prior(model.sites[name]).stddev
            for member in range(3):
                sliced = slice_of(member, {name: own})[name]
                torch.testing.assert_close(sliced, alone.prior(site).stddev, atol=0, rtol=1e-12)

    def test_a_point_on_the_simplex_has_unconstrained_coordinates(self, three_topics_model):
        model = three_topics_model(torch.float32, adapter=LoRAPool(members=3, rank=2, concentration=1.0))
        factor = dict(build_guide(Point(), model).items())["pool.weights"]
        assert factor.roles["value"] == "point"
        assert factor.value.shape == (2,)

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"members": 0}, "at least one member; got 0"),
            ({"concentration": 0.0}, "must be positive; got 0.0"),
            ({"concentration": 1.0, "members": 1}, "single member is 1"),
            ({"form": "fixed_B"}, "changes both factors"),
        ],
    )
    def test_bad_settings_are_refused(self, settings, reason):
        with pytest.raises(ValueError, match=reason):
            LoRAPool(**settings)

    def test_another_number_of_weights_is_refused(self, built):
        _, sites, constants = built
        with pytest.raises(ValueError, match="2 weights for 3 members"):
            POOL.deltas(sites, {**constants, **random_draw(sites), "pool.weights": torch.full((2,), 0.5)})


class TestRule:
    @pytest.fixture
    def scored(self):
        generator = torch.Generator().manual_seed(1)
        return torch.rand(4, 10, 5, dtype=torch.float64, generator=generator), torch.arange(10) % 5

    def test_scores_are_means_over_examples(self, scored):
        similarity, labels = scored
        intra, inter = class_scores(similarity[0], labels)
        _, summed = class_scores(similarity[0], labels, "paper")
        own = torch.stack([similarity[0, row, label] for row, label in enumerate(labels)])
        others = torch.stack(
            [similarity[0, row, [c for c in range(5) if c != label]].sum() for row, label in enumerate(labels)]
        )
        assert float(intra) == pytest.approx(float(own.mean()), abs=1e-12)
        assert float(summed) == pytest.approx(float(others.mean()), abs=1e-12)
        assert float(inter) == pytest.approx(float(others.mean()) / 4, abs=1e-12)

    @pytest.mark.parametrize("top", [1, 2, 4])
    @pytest.mark.parametrize("sharpness", [0.0, 1.0, 8.0])
    def test_weights_are_a_softmax_over_the_leading_members(self, scored, top, sharpness):
        rule = MergeRule(intra=0.6, sharpness=sharpness, top=top)
        scores = rule.score(*scored)
        raw = torch.exp(-sharpness * (1 - scores))
        raw[scores < scores.topk(top).values.min()] = 0
        weights = rule(*scored)
        torch.testing.assert_close(weights, raw / raw.sum(), atol=1e-15, rtol=1e-12)
        assert float(weights.sum()) == pytest.approx(1.0, abs=1e-15)
        assert int((weights > 0).sum()) == top
        if sharpness == 0:
            assert torch.equal(weights[weights > 0], torch.full((top,), 1 / top, dtype=torch.float64))
        if top == 1:
            assert weights.max() == 1

    def test_many_tasks_are_weighed_at_once(self, scored):
        similarity, labels = scored
        rule = MergeRule(top=2)
        both = rule(torch.stack([similarity, similarity.flip(0)]), torch.stack([labels, labels.flip(0)]))
        assert torch.equal(both[0], rule(similarity, labels))
        assert torch.equal(both[1], rule(similarity.flip(0), labels.flip(0)))

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"intra": 1.5}, r"in \[0, 1\]; got 1.5"),
            ({"sharpness": -1.0}, "must not be negative"),
            ({"top": 0}, "At least one member"),
            ({"variant": "papper"}, "Did you mean 'paper'"),
            ({"sharpness": float("inf")}, "'sharpness' of MergeRule is a finite number; got inf"),
            ({"intra": float("nan")}, "'intra' of MergeRule is a finite number; got nan"),
            ({"top": 1.5}, "'top' of MergeRule is a whole number; got 1.5. Give 2"),
        ],
    )
    def test_bad_settings_are_refused(self, settings, reason):
        with pytest.raises(ValueError, match=reason):
            MergeRule(**settings)

    def test_more_leading_members_than_members_are_refused(self, scored):
        with pytest.raises(ValueError, match="pool has 4"):
            MergeRule(top=5)(*scored)

    def test_one_class_tells_no_member_apart(self):
        with pytest.raises(ValueError, match="there is 1 class"):
            class_scores(torch.ones(3, 1), torch.zeros(3, dtype=torch.long))


class TestTrim:
    @pytest.fixture
    def weight(self):
        return torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    @pytest.mark.parametrize("fraction", [0.2, 0.5, 0.99])
    def test_it_is_the_nearest_matrix_of_its_rank(self, weight, fraction):
        kept, s = int(12 * fraction), torch.linalg.svdvals(weight)
        found = trimmed(weight, fraction)
        assert torch.linalg.matrix_rank(found) == kept
        assert float((weight - found).norm()) == pytest.approx(float(s[kept:].norm()), abs=1e-12)

    def test_the_whole_is_itself(self, weight):
        assert torch.equal(trimmed(weight, 1.0), weight)

    def test_a_merge_is_trimmed_whole_where_asked_and_taken_out_exactly(self, three_topics_model):
        model = three_topics_model(torch.float64, adapter=POOL)
        network = model.backbone.network
        before = copy.deepcopy(network.state_dict())
        draw = {name: 0.3 * torch.randn(site.shape, dtype=torch.float64) for name, site in model.sites.items()}
        trim = Trim(0.5, targets=("v_proj",), layers=(1,))
        with merged(model, draw):
            plain = copy.deepcopy(network.state_dict())
        with merged(model, draw, finish=trim.of(model.backbone)):
            for name, value in network.state_dict().items():
                expected = trimmed(plain[name], 0.5) if "layers.1.self_attn.v_proj" in name else plain[name]
                assert torch.equal(value, expected)
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

    @pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1])
    def test_a_fraction_out_of_range_is_refused(self, fraction):
        with pytest.raises(ValueError, match=r"in \(0, 1\]"):
            Trim(fraction)

    @pytest.mark.parametrize("fraction", [float("nan"), "0.5"])
    def test_a_fraction_that_is_no_number_is_refused(self, fraction):
        with pytest.raises(ValueError, match="'fraction' of Trim is a finite number; got"):
            Trim(fraction)

    def test_keeping_nothing_is_refused(self, weight):
        with pytest.raises(ValueError, match=r"keeps none; choose at least 0.0833"):
            trimmed(weight, 0.05)
