"""Train the DiT on encoded clips (see make_latents.py) and the frozen text encoder (train_text.py), by rectified flow.

    python recipes/demo/train_dit.py

Resumes from runs/demo/dit.pt; --minutes ends a stage early, and the same command goes on from there.
Of the clips six in ten are conditioned on text alone, the rest also on the first, or on the first and last frame.
"""

from __future__ import annotations

import argparse
import time

import fused
import loop
import sample
import torch
from make_latents import FIRST, FIRST_LAST, LATENTS, LOT, VAE, load_vae
from model import CHECKPOINT, Model
from torch import Tensor, nn
from train_text import CHECKPOINT as TEXT_CHECKPOINT
from train_text import token_ids
from train_vae import RUNS

from kinema.models.tokenizer import Tokenizer

BATCH = 64
WITH_FIRST, WITH_FIRST_LAST = 16, 10  # of the batch
DROP_TEXT = 0.1
SHIFT = 3.0


class Bank:
    """All encoded clips in memory. Rows of `first` and `first_last` are the leading clips of every lot."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        lots = [torch.load(path, weights_only=True) for path in sorted(LATENTS.glob("*.pt"))]
        self.clips = torch.cat([lot["clips"] for lot in lots])
        self.first = torch.cat([lot["first"] for lot in lots])
        self.first_last = torch.cat([lot["first_last"] for lot in lots])
        self.ids = token_ids(tokenizer, [text for lot in lots for text in lot["captions"]])
        self.blank = token_ids(tokenizer, [""])[0]

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents, conditioning channels, token ids."""

        def draw(count: int, end: int) -> Tensor:
            return torch.randint(end, (count,), generator=generator)

        lots = len(self.clips) // LOT
        first, first_last = draw(WITH_FIRST, lots * FIRST), draw(WITH_FIRST_LAST, lots * FIRST_LAST)
        rows = torch.cat(
            [
                first // FIRST * LOT + first % FIRST,
                first_last // FIRST_LAST * LOT + first_last % FIRST_LAST,
                draw(BATCH - WITH_FIRST - WITH_FIRST_LAST, len(self.clips)),
            ]
        )
        clean = self.clips[rows].float()
        concat = torch.zeros(BATCH, 20, *clean.shape[2:])
        a, b = WITH_FIRST, WITH_FIRST + WITH_FIRST_LAST
        concat[:a, 4:], concat[a:b, 4:] = self.first[first].float(), self.first_last[first_last].float()
        concat[:b, :4, 0] = 1
        concat[a:b, 3, -1] = 1
        ids = self.ids[rows]
        dropped = torch.rand(BATCH, generator=generator) < DROP_TEXT
        ids[dropped] = 0
        ids[dropped, : len(self.blank)] = self.blank
        return clean, concat, ids


def flow_loss(model: Model, batch: tuple[Tensor, Tensor, Tensor], device: str) -> Tensor:
    """Squared error of the velocity noise - clean at sigma drawn uniformly, then shifted towards noise."""
    clean, concat, ids = (tensor.to(device) for tensor in batch)
    u = torch.rand(len(clean), device=device)
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    noise = torch.randn_like(clean)
    s = sigma.view(-1, 1, 1, 1, 1)
    given = ((1 - s) * clean + s * noise, 1000 * sigma, ids, concat)
    velocity = torch.func.functional_call(model, model.fast_weights(), given)
    return (velocity - (noise - clean)).square().mean()


def optimisers(model: Model, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for the rest."""
    matrices = [
        p
        for name, p in model.dit.named_parameters()
        if name.startswith("blocks.") and name.endswith("weight") and p.ndim == 2
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.dit.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=5),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train(steps: int, rate: float, minutes: float, device: str) -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_path(RUNS / "spiece.model")
    model, average = Model().to(device), Model().to(device)
    fused.compile_blocks(model.dit)
    both = optimisers(model, rate)
    state, step = loop.restore(CHECKPOINT), 0
    if state is None:
        model.text.load_state_dict(torch.load(TEXT_CHECKPOINT, weights_only=True)["model"])
        average.load_state_dict(model.state_dict())
    else:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimiser, saved in zip(both, state["optimisers"], strict=False):  # none after unpack.py
            optimiser.load_state_dict(saved)
        step = state["step"]
    bank, log, generator = Bank(tokenizer), loop.Log(RUNS / "dit.jsonl"), torch.Generator().manual_seed(step)
    vae = load_vae(VAE, device)
    torch.manual_seed(step)
    log(step=step, clips=len(bank.clips), parameters=sum(p.numel() for p in model.parameters()))
    started, total = time.perf_counter(), 0.0
    while step < steps and time.perf_counter() - started < 60 * minutes:
        for optimiser in both:
            loop.set_rate(optimiser, loop.learning_rate(step, steps, rate, warmup=200))
        loss = flow_loss(model, bank.batch(generator), device)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in both:
            optimiser.step()
        step += 1
        with torch.no_grad():
            decay = min(0.999, (1 + step) / (20 + step))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        total += float(loss.detach())
        if step % 50 == 0:
            log(step=step, loss=total / 50)
            total = 0.0
        if step % 500 == 0 or step == steps:
            save(model, average, both, step)
        if step % 1000 == 0 or step == steps:
            log(step=step, **sample.prove(average.text, average.dit, tokenizer, vae, device))
    save(model, average, both, step)


def save(model: Model, average: Model, both: list[torch.optim.Optimizer], step: int) -> None:
    state = {"model": model.state_dict(), "average": average.state_dict(), "step": step}
    loop.save(CHECKPOINT, {**state, "optimisers": [optimiser.state_dict() for optimiser in both]})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--minutes", type=float, default=110)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    train(given.steps, given.rate, given.minutes, given.device)
