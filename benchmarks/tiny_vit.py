"""Pre-train the tiny ViT on Omniglot's first background set, once: what the vision benchmarks start from.

Usage::

    python benchmarks/tiny_vit.py --data-dir data --out runs/tiny_vit

The folder is in transformers format and loads with ``load_backbone("runs/tiny_vit")``. Three blocks of width 48, patches of
7, 28 x 28 grey pixels, 136 classes of 20 drawings each, shifted and scaled at random. A finished folder is left as it is.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from pyrolora.models.tasks import Split, encode_images, task
from pyrolora.models.vision import VisionBackbone
from pyrolora.models.vision.loading import tiny_vit


def shifted(images: Tensor, generator: torch.Generator, strength: float = 0.15) -> Tensor:
    """Images after a random small shift, turn and change of size each."""
    rows = images.shape[0]
    noise = torch.rand(rows, 4, generator=generator) * 2 - 1
    angle, size = noise[:, 0] * 2 * strength, 1 + noise[:, 1] * strength
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(rows, 2, 2) * size[:, None, None]
    where = torch.cat([turn, noise[:, 2:, None] * 2 * strength], dim=2).to(images.device)
    grid = functional.affine_grid(where, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def pretrained(
    folder: Path, data_dir: str, *, epochs: int = 60, device: str = "cpu", seed: int = 0, width: int = 48
) -> Path:
    """The folder of the pre-trained network, made if it is not there."""
    if (folder / "config.json").is_file():
        return folder
    source = task("omniglot_background", data_dir=data_dir)
    parts = (source.train, source.validation, source.test)
    everything = Split("all", source.name, tuple(one for part in parts for one in part.examples), len(source.labels))
    backbone = VisionBackbone(
        tiny_vit(seed, hidden_size=width, intermediate_size=4 * width, initializer_range=0.02), "tiny"
    )
    data = encode_images(everything, source.format, channels=1, size=28, tokens=backbone.tokens)
    whole = data.batch(list(range(len(data))), device=device)
    network = backbone.network.requires_grad_(True).train().to(device)
    torch.manual_seed(seed)
    head = torch.nn.Linear(width, len(source.labels)).to(device)
    optimiser = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(data) // 64)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    generator, right, start = torch.Generator().manual_seed(seed), 0.0, time.perf_counter()
    bar = tqdm(range(steps), desc="pre-training", mininterval=5)
    order: list[Tensor] = []
    for _ in bar:
        order = order or list(torch.randperm(len(data), generator=generator)[: len(data) // 64 * 64].split(64))
        rows = order.pop().to(device)
        pixels = shifted(whole["pixel_values"][rows], generator)
        logits = head(network((pixels - 0.5) / 0.5).last_hidden_state[:, 0])
        loss = functional.cross_entropy(logits, whole["labels"][rows], label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        plan.step()
        right = 0.98 * right + 0.02 * float((logits.argmax(-1) == whole["labels"][rows]).float().mean())
        bar.set_postfix(accuracy=f"{right:.2f}", refresh=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    network.eval().save_pretrained(partial)
    (partial / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5], "image_std": [0.5]}))
    seconds = time.perf_counter() - start
    (partial / "pretraining.json").write_text(
        json.dumps({"epochs": epochs, "seed": seed, "train_accuracy": right, "seconds": seconds, "device": device})
    )
    partial.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    print(f"Pre-trained in {seconds:.0f} s; running training accuracy {right:.3f}; kept in {folder}.")
    return folder


def main() -> None:
    """Pre-train and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder that holds Omniglot, or its parent")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pretrained(options.out, options.data_dir, epochs=options.epochs, device=options.device, seed=options.seed)


if __name__ == "__main__":
    main()
