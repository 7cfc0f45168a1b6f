"""Merging into a plain classifier, and accuracies of tasks over one label space."""

import logging

import pytest
import torch
from transformers import AutoModelForImageClassification, Dinov2Config, Dinov2Model

from pyrolora.guides import MeanField, Point, build_guide
from pyrolora.inference.evaluation import evaluate
from pyrolora.inference.evaluation.retention import Retention, task_accuracies
from pyrolora.inference.map import MAP
from pyrolora.inference.merging import merge
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.svi import SVI
from pyrolora.models.adapters import LastLayer, LoRA, MixtureLoRA, MoEfiedLoRA
from pyrolora.models.program import BayesianModel
from pyrolora.models.vision import VisionBackbone


@pytest.fixture
def pixels():
    return torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def logits_of(model, pixels, draw):
    with torch.no_grad():
        return model.row_logits({"pixel_values": pixels}, draw)


class TestMerge:
    @pytest.mark.parametrize("adapter", [MoEfiedLoRA(rank=2, experts=4), LoRA(rank=2)], ids=["moefied", "lora"])
    @pytest.mark.parametrize("head", [LastLayer(), LastLayer(bias=True, identified=True)], ids=["plain", "bias"])
    def test_it_computes_what_the_model_computes(self, three_shapes_model, pixels, adapter, head, tmp_path):
        model = three_shapes_model(torch.float32, adapter=[adapter, head])
        engine = SVI(guide=MeanField(init_scale=0.3), steps=4, learning_rate=0.1)
        posterior = engine.fit(model, model.task.train, progress=False)
        before = {name: value.clone() for name, value in model.backbone.network.state_dict().items()}
        one = {name: value[0] for name, value in posterior.sample(1).items()}
        seen = []
        for draw in (None, one):
            network = merge(posterior, draw)
            expected = logits_of(model, pixels, posterior.mean() if draw is None else draw)
            got = network((pixels - 0.5) / 0.5).logits
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
            seen.append(got)
        assert (seen[0] - seen[1]).abs().max() > 0.1
        # the network underneath is as it was, and the classifier needs nothing of it
        for name, value in model.backbone.network.state_dict().items():
            assert torch.equal(value, before[name])
        network.save_pretrained(tmp_path)
        again = AutoModelForImageClassification.from_pretrained(tmp_path)
        torch.testing.assert_close(again((pixels - 0.5) / 0.5).logits, network((pixels - 0.5) / 0.5).logits)
        assert again.config.id2label == {0: "top", 1: "middle", 2: "bottom"}

    def test_a_gate_for_each_row_is_no_single_network(self, three_shapes_model):
        model = three_shapes_model(adapter=[MixtureLoRA(rank=2, experts=2), LastLayer()])
        posterior = Posterior(model, build_guide(Point(), model), {})
        with pytest.raises(
            ValueError, match=r"MixtureLoRA is another network for every value of 'sequence', and merge makes"
        ):
            merge(posterior)

    def test_dinov2_whose_classifier_reads_the_patches_as_well(self, three_shapes, pixels):
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=8,
            num_channels=1, initializer_range=0.3,
        )  # fmt: skip
        model = BayesianModel(
            VisionBackbone(Dinov2Model(config), "tiny"), three_shapes(), adapter=MoEfiedLoRA(rank=2, experts=4)
        )
        posterior = MAP(steps=4, learning_rate=0.1).fit(model, model.task.train, progress=False)
        expected = logits_of(model, pixels, posterior.mean())
        torch.testing.assert_close(merge(posterior)((pixels - 0.5) / 0.5).logits, expected, rtol=0, atol=1e-4)

    def test_a_router_that_has_not_faded_is_refused(self, three_shapes_model):
        """E9: merging raises before the fade is one, and not from then on."""
        model = three_shapes_model(adapter=[MoEfiedLoRA(rank=2, experts=4, fade_end=0.75), LastLayer()])
        run = MAP(steps=8).iterate(model, model.task.train)
        for stats in run:
            if stats.step < 6:
                with pytest.raises(
                    ValueError,
                    match=r"After \d+% of the training the router has not faded.*MoEfiedLoRA\(.*fade_end=0.75",
                ):
                    merge(run.posterior())
            else:
                merge(run.posterior())

    def test_a_network_that_computes_something_else_is_refused(self, three_shapes_model, monkeypatch):
        model = three_shapes_model(adapter=[LoRA(rank=2), LastLayer()])
        posterior = MAP(steps=4, learning_rate=0.1).fit(model, model.task.train, progress=False)
        honest = type(model).feature_logits
        monkeypatch.setattr(type(model), "feature_logits", lambda self, *given: 1.01 * honest(self, *given))
        with pytest.raises(ValueError, match="logits differ by"):
            merge(posterior)

    def test_text_has_its_own_way(self, three_topics_model):
        model = three_topics_model()
        posterior = MAP(steps=1).fit(model, model.task.train, progress=False)
        with pytest.raises(ValueError, match=r"Use merged\(model, draw\)"):
            merge(posterior)


class TestRetention:
    def test_accuracies_are_over_the_whole_label_space(self, three_shapes):
        task = three_shapes(groups=(("one", 1), ("two", 2)))
        labels = torch.tensor([0, 0, 1, 2])
        probs = torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 0]), 3).float()
        assert task_accuracies(probs, labels, task) == {"one": 0.5, "two": 0.5}
        assert task_accuracies(probs[:2], labels[:2], task) == {"one": 0.5}
        assert task_accuracies(probs, labels, three_shapes()) == {"three_shapes": 0.5}

    def test_a_report_has_a_column_for_each_task(self, three_shapes_model, three_shapes):
        task = three_shapes(groups=(("one", 1), ("two", 2)))
        model = three_shapes_model(torch.float32, adapter=LastLayer(), task=task)
        posterior = MAP(steps=6, learning_rate=0.05).fit(model, task.train, progress=False)
        report = evaluate({"map": posterior}, task.test, groups=task.format.groups, progress=False)
        found = posterior.predict(task.test)
        expected = task_accuracies(found.mean_probs, found.labels, task)
        for name, value in expected.items():
            assert report.rows[0].metrics[f"accuracy_of/{name}"].value == pytest.approx(value)
        assert "Accuracy of each task over the whole label space" in report.to_markdown()

    def test_what_is_lost_is_the_peak_minus_the_end(self, three_shapes_model, three_shapes, caplog):
        task = three_shapes(groups=(("one", 1), ("two", 2)))
        model = three_shapes_model(adapter=LastLayer(), task=task)
        retention = Retention(task, task.validation)
        run = MAP(steps=3, learning_rate=0.05).iterate(model, task.train)
        with caplog.at_level(logging.INFO):
            for _ in run:
                retention.look(run.posterior())
        assert "67 % of training: one" in caplog.text
        assert {name: len(curve) for name, curve in retention.curves.items()} == {"one": 3, "two": 3}
        retention.curves = {"one": [0.2, 0.9, 0.7], "two": [0.1, 0.2, 0.4]}
        assert retention.lost == {"one": pytest.approx(0.2), "two": 0.0}

    def test_texts_have_no_groups(self, three_topics):
        with pytest.raises(ValueError, match="has no groups of classes"):
            task_accuracies(torch.ones(1, 3), torch.zeros(1, dtype=torch.int64), three_topics())
