"""Encode captioned clips with the finished autoencoder, in lots of 1000 clips: what the DiT trains on.

    python recipes/demo/make_latents.py

Skips lots that exist. The first one also measures the latent statistics. A lot of runs/demo/latents holds, float16:
clips_NCFhw, and for its leading clips the encodings of [first frame, grey, ...] and of [first, grey, ..., last].
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import loop
import torch
import whole_clip
from torch import Tensor
from train_vae import CONFIG, RUNS

from kinema.models.wan_vae import WanVAE

LOT, FIRST, FIRST_LAST = 1000, 300, 200
LATENTS, STATISTICS, VAE = RUNS / "latents", RUNS / "statistics.json", RUNS / "vae_clip17.pt"


def load_vae(path: Path, device: str) -> WanVAE:
    """The finished autoencoder, with the latent statistics where they are measured already."""
    measured = json.loads(STATISTICS.read_text()) if STATISTICS.exists() else {"mean": [0.0] * 16, "std": [1.0] * 16}
    config = replace(CONFIG, latent_mean=tuple(measured["mean"]), latent_std=tuple(measured["std"]))
    vae = WanVAE(config).to(device)
    vae.load_state_dict(torch.load(path, weights_only=True)["model"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: WanVAE, frames: Tensor, keep: tuple[int, ...] | None, device: str) -> Tensor:
    """Unnormalised latents of uint8 clips; `keep` names the frames that are not replaced by grey."""
    latents = []
    for rows in frames.split(8):
        x = loop.video(rows, device).contiguous(memory_format=torch.channels_last_3d)
        if keep is not None:
            given, x = x, torch.zeros_like(x)
            for frame in keep:
                x[:, :, frame] = given[:, :, frame]
        with torch.autocast(device, torch.bfloat16):
            latents.append(whole_clip.encode(vae, x).float())
    return torch.cat(latents)


def statistics(clips_NCFhw: Tensor) -> dict[str, list[float]]:
    axes = (0, 2, 3, 4)
    mean, std = clips_NCFhw.mean(dim=axes), clips_NCFhw.std(dim=axes)
    return {"mean": [round(v, 4) for v in mean.tolist()], "std": [round(v, 4) for v in std.tolist()]}


def main(lots: int, two_share: float, device: str) -> None:
    LATENTS.mkdir(parents=True, exist_ok=True)
    vae = load_vae(VAE, device)
    whole_clip.fuse()
    for lot in range(lots):
        path, started = LATENTS / f"{lot:03}.pt", time.perf_counter()
        if path.exists():
            continue
        frames, captions = loop.bank(range(lot * LOT, (lot + 1) * LOT), two_share=two_share)
        clips = encode(vae, frames, None, device)
        if not STATISTICS.exists():
            STATISTICS.write_text(json.dumps(statistics(clips)))
        parts = {
            "clips": clips,
            "first": encode(vae, frames[:FIRST], (0,), device),
            "first_last": encode(vae, frames[:FIRST_LAST], (0, frames.shape[1] - 1), device),
        }
        measured = json.loads(STATISTICS.read_text())
        mean, std = (torch.tensor(measured[key], device=device).view(-1, 1, 1, 1) for key in ("mean", "std"))
        tensors = {name: ((latents - mean) / std).half().cpu() for name, latents in parts.items()}
        loop.save(path, {**tensors, "captions": captions})
        print(f"lot {lot}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lots", type=int, default=8)
    parser.add_argument("--two-share", type=float, default=0.7, help="share of clips with two things")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    main(given.lots, given.two_share, given.device)
