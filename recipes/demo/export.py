"""Write the trained parts as the three float16 files that ship in the package.

    python recipes/demo/export.py

Names are the official checkpoints'. Facts no header can tell ride in the safetensors metadata: the latent statistics
and preview factors of this autoencoder. The tokenizer is a tensor inside the text encoder, as in ComfyUI's files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import loop
import torch
from make_latents import VAE, encode, load_vae
from model import CHECKPOINT, Model
from safetensors.torch import save_file
from torch import Tensor, nn
from train_vae import RUNS

from kinema.media.preview import fit_preview

ASSETS = Path("src/kinema/assets/demo")


def half(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.half().contiguous() for name, tensor in module.state_dict().items()}


def preview_factors(vae: nn.Module) -> list[list[float]]:
    """Linear latent-to-RGB factors of this autoencoder, from 64 clips."""
    frames, _ = loop.bank(range(64))
    latents = vae.normalise(encode(vae, frames, None, "cpu"))
    factors = fit_preview(list(latents), [clip.float() / 255 for clip in frames])
    return [[round(value, 4) for value in row] for row in factors.tolist()]


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    licence = {"licence": "Apache-2.0", "source": "recipes/demo"}
    vae = load_vae(VAE, "cpu")
    facts = {
        "latent_mean": json.dumps(vae.config.latent_mean),
        "latent_std": json.dumps(vae.config.latent_std),
        "preview_rgb": json.dumps(preview_factors(vae)),
    }
    save_file(half(vae), out / "vae.safetensors", metadata={**licence, **facts})
    state = torch.load(CHECKPOINT, weights_only=True)
    model = Model()
    model.load_state_dict(state["average"])
    save_file(half(model.dit), out / "dit.safetensors", metadata={**licence, "steps": str(state["step"])})
    spiece = torch.frombuffer(bytearray((RUNS / "spiece.model").read_bytes()), dtype=torch.uint8)
    save_file({**half(model.text), "spiece_model": spiece}, out / "text_encoder.safetensors", metadata=licence)
    for path in sorted(out.glob("*.safetensors")):
        print(f"{path.name}  {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS)
    main(parser.parse_args().out)
