"""Generate a batch of clips with models in memory, and prove that they show their captions.

    python recipes/demo/sample.py --count 48

The user's way is kinema.generate; this one batches, for watching a training run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import data
import measure
import numpy as np
import torch
import whole_clip
from make_latents import VAE, load_vae
from model import CHECKPOINT, Model
from PIL import Image
from torch import Tensor
from train_vae import RUNS

from kinema.models.encoders import UMT5, encode_prompts
from kinema.models.tokenizer import Tokenizer
from kinema.models.wan import WanDiT
from kinema.models.wan_vae import WanVAE
from kinema.sampling.schedule import schedule
from kinema.sampling.solvers import SOLVERS
from kinema.tensors import Conditions

STEPS, GUIDANCE, SHIFT = 20, 4.0, 3.0


@torch.no_grad()
def latents(
    text: UMT5,
    dit: WanDiT,
    tokenizer: Tokenizer,
    captions: Sequence[str],
    concat_BCFhw: Tensor,
    *,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    device: str = "cpu",
) -> Tensor:
    """Normalised latents of captions under mask and image channels [B, 20, F, h, w]; UniPC with guidance."""
    noise = torch.randn(len(captions), 16, *concat_BCFhw.shape[2:], generator=torch.Generator().manual_seed(seed))
    grid = schedule("unipc", steps, SHIFT)
    with torch.autocast(device, torch.bfloat16):
        texts = encode_prompts(text, tokenizer, [*captions, ""], dit.config.text_len, device)
        given = Conditions(texts[:-1], concat_BCFhw=concat_BCFhw.to(device))
        cond = dit.prepare(given)
        uncond = dit.prepare(replace(given, text=texts[-1:] * len(captions)))

        def velocity(x: Tensor, index: int) -> Tensor:
            t = torch.full((len(x),), grid.timesteps[index], device=device)
            v, v0 = dit(x, t, cond), dit(x, t, uncond)
            return v0 + guidance * (v - v0)

        *_, last = SOLVERS["unipc"](velocity, noise.to(device), grid.sigmas)
    return last.x


@torch.no_grad()
def decode(vae: WanVAE, latents_BCFhw: Tensor, device: str = "cpu") -> data.Clip:
    """uint8 frames [B, T, H, W, 3]."""
    clips = []
    for rows in latents_BCFhw.split(8):
        with torch.autocast(device, torch.bfloat16):
            x = whole_clip.decode(vae, vae.denormalise(rows))
        clips.append(((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).cpu())
    return torch.cat(clips).numpy()


def held_out(count: int) -> tuple[list[str], list[data.Scene]]:
    drawn = [data.clip(seed, "held_out", two_share=0.5)[1:] for seed in range(1000, 1000 + count)]
    return [text for text, _ in drawn], [scene for _, scene in drawn]


def shares(clips: Sequence[data.Clip], scenes: Sequence[data.Scene]) -> dict[str, float]:
    verdicts = [measure.verdict(clip, scene) for clip, scene in zip(clips, scenes, strict=True)]
    return {key: float(np.mean([verdict[key] for verdict in verdicts])) for key in verdicts[0]}


def prove(text: UMT5, dit: WanDiT, tokenizer: Tokenizer, vae: WanVAE, device: str, count: int = 32) -> dict[str, float]:
    """Share of held-out captions whose clip shows each attribute, and all against the next clip's caption."""
    captions, scenes = held_out(count)
    clips = decode(vae, latents(text, dit, tokenizer, captions, torch.zeros(count, 20, 5, 8, 8), device=device), device)
    return {**shares(clips, scenes), "shuffled": shares(np.roll(clips, 1, axis=0), scenes)["all"]}


def main(count: int, device: str, picture: Path) -> None:
    model = Model().to(device)
    model.load_state_dict(torch.load(CHECKPOINT, weights_only=True)["average"])
    tokenizer, vae = Tokenizer.from_path(RUNS / "spiece.model"), load_vae(VAE, device)
    captions, scenes = held_out(count)
    concat = torch.zeros(count, 20, 5, 8, 8)
    clips = decode(vae, latents(model.text, model.dit, tokenizer, captions, concat, device=device), device)
    print(shares(clips, scenes))
    for caption, clip, scene in zip(captions, clips, scenes, strict=True):
        right = measure.verdict(clip, scene)
        print("right" if right["all"] else [key for key, value in right.items() if not value], caption)
    Image.fromarray(np.concatenate([np.concatenate(list(clip[::4]), axis=1) for clip in clips])).save(picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--picture", type=Path, default=Path("runs/demo/samples.png"))
    given = parser.parse_args()
    main(given.count, given.device, given.picture)
