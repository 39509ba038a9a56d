"""Train the autoencoder: first on single frames (a 2D model), then on clips of 5, then of 17 frames.

    python recipes/demo/train_vae.py image
    python recipes/demo/train_vae.py clip5
    python recipes/demo/train_vae.py clip17

Each stage starts from the one before and resumes from its own checkpoint in runs/demo.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import loop
import torch
import torch.nn.functional as F
import whole_clip
from torch import Tensor

from kinema.models.wan_vae import WanVAE, WanVAEConfig

RUNS = Path("runs/demo")
CONFIG = WanVAEConfig(dim=32, dim_mult=(1, 2, 2, 2), num_res_blocks=1)


@dataclass(frozen=True)
class Stage:
    """frames   per example; 1 trains the image model.
    noise       added to the latents, of standard deviation about one: what the decoder must forgive the DiT.
    """

    after: str | None
    frames: int
    batch: int
    steps: int
    rate: float
    noise: float = 0.05


STAGES = {
    "image": Stage(None, 1, 16, 2500, 1e-3, noise=0.0),
    "clip5": Stage("image", 5, 4, 600, 8e-4),
    "clip17": Stage("clip5", 17, 2, 700, 5e-4),
}


def examples(frames: Tensor, stage: Stage, generator: torch.Generator, device: str) -> Tensor:
    """Random frames, or random runs of consecutive frames, of the bank."""
    rows = torch.randint(len(frames), (stage.batch,), generator=generator)
    starts = torch.randint(frames.shape[1] - stage.frames + 1, (stage.batch,), generator=generator)
    if stage.frames == 1:
        return loop.video(frames[rows, starts], device).contiguous(memory_format=torch.channels_last)
    runs = [frames[row, start : start + stage.frames] for row, start in zip(rows, starts, strict=True)]
    return loop.video(torch.stack(runs), device).contiguous(memory_format=torch.channels_last_3d)


def losses(vae: WanVAE, x: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Training loss and mean squared error of the reconstruction in [-1, 1]."""
    with torch.autocast(x.device.type, torch.bfloat16):
        z = whole_clip.encode(vae, x)
        y = whole_clip.decode(vae, z + noise * torch.randn_like(z)).float()
    squared = F.mse_loss(y, x)
    drift = z.float().square().mean() - 1
    return F.l1_loss(y, x) + squared + 1e-2 * drift.square(), squared


@torch.no_grad()
def psnr(vae: WanVAE, frames: Tensor, stage: Stage, device: str) -> float:
    """Mean over clips of the PSNR in dB against held-out clips, clamped to the visible range."""
    values = []
    for rows in frames.split(8):
        rows = rows[:, 8] if stage.frames == 1 else rows[:, : stage.frames]
        x = loop.video(rows, device)
        with torch.autocast(device, torch.bfloat16):
            y = whole_clip.decode(vae, whole_clip.encode(vae, x)).float().clamp(-1, 1)
        values.append(-10 * torch.log10(((y - x) / 2).square().flatten(1).mean(dim=1)))
    return float(torch.cat(values).mean())


def train(name: str, device: str, clips: int) -> None:
    stage, path = STAGES[name], RUNS / f"vae_{name}.pt"
    torch.manual_seed(0)
    vae = WanVAE(CONFIG).to(device)
    optimiser = torch.optim.Adam(vae.parameters(), lr=stage.rate, betas=(0.9, 0.98))
    state, step = loop.restore(path), 0
    if state is not None:
        vae.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step = state["step"]
    elif stage.after is not None:
        vae.load_state_dict(torch.load(RUNS / f"vae_{stage.after}.pt", weights_only=True)["model"])
        if STAGES[stage.after].frames == 1:
            whole_clip.grow_temporal(vae)
    else:
        whole_clip.initialise(vae)
    whole_clip.fuse()
    train_frames, _ = loop.bank(range(clips))
    test_frames, _ = loop.bank(range(32), "held_out")
    log = loop.Log(RUNS / f"vae_{name}.jsonl")
    generator = torch.Generator().manual_seed(step)
    while step < stage.steps:
        loop.set_rate(optimiser, loop.learning_rate(step, stage.steps, stage.rate))
        loss, squared = losses(vae, examples(train_frames, stage, generator, device), stage.noise)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 50 == 0:
            log(step=step, loss=float(loss.detach()), train_db=float(-10 * torch.log10(squared.detach() / 4)))
        if step % 250 == 0 or step == stage.steps:
            log(step=step, held_out_db=psnr(vae, test_frames, stage, device))
            loop.save(path, {"model": vae.state_dict(), "optimiser": optimiser.state_dict(), "step": step})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clips", type=int, default=3000, help="clips of the training bank")
    given = parser.parse_args()
    train(given.stage, given.device, given.clips)
