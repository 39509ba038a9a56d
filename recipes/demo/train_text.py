"""Teach the text encoder to read: which words belong to which thing.

    python recipes/demo/train_text.py

From each token of a clause ("a large red circle moves left") a linear layer must tell all attributes of that thing,
from each token behind the clauses the background. Writes runs/demo/text.pt in a minute; the linear layer is dropped,
and the DiT is then trained on the frozen encoder, as Wan is on umT5.

Trained through the DiT alone the encoder never learned this: a velocity's error says little of whose motion is whose.
"""

from __future__ import annotations

import argparse
import time

import data
import loop
import numpy as np
import torch
from torch import Tensor, nn
from train_vae import RUNS

from kinema.models.encoders import UMT5, TextEncoderConfig
from kinema.models.tokenizer import Tokenizer

LONGEST = 32  # tokens of a caption
TEXT = TextEncoderConfig(vocab=256, dim=128, dim_attn=128, num_heads=4, ffn_dim=256, num_layers=2)
CHECKPOINT = RUNS / "text.pt"
CLASSES = ((None, "small", "large"), tuple(data.COLOURS), data.SHAPES, data.MOTIONS, tuple(data.BACKGROUNDS))
NOTHING = -100  # what cross_entropy leaves out
BATCH = 128
RATE = 5e-3


def token_ids(tokenizer: Tokenizer, captions: list[str]) -> Tensor:
    """Token ids padded with 0, int64 [N, LONGEST]."""
    rows = [torch.tensor(tokenizer.encode(text, LONGEST).ids) for text in captions]
    return torch.stack([nn.functional.pad(row, (0, LONGEST - len(row))) for row in rows])


def truths(tokenizer: Tokenizer, scene: data.Scene, clauses: list[str], caption: str) -> Tensor:
    """What each token belongs to, int64 [LONGEST, 5]: size, colour, shape, motion of its thing; or the background."""

    def tokens(end: int) -> int:
        return len(tokenizer.encode(caption[:end], LONGEST).ids) - 1  # without the end token

    truth = torch.full((LONGEST, len(CLASSES)), NOTHING)
    end = 0
    for thing, clause in zip(scene.things, clauses, strict=True):
        start = caption.index(clause, end)
        end = start + len(clause)
        of_thing = (thing.size, thing.colour, thing.shape, thing.motion)
        row = [values.index(value) for values, value in zip(CLASSES, of_thing, strict=False)]
        truth[tokens(start) : tokens(end), :4] = torch.tensor(row)
    truth[tokens(end) : tokens(len(caption)), 4] = CLASSES[4].index(scene.background)
    return truth


def captions(count: int, tokenizer: Tokenizer, split: data.Split) -> tuple[Tensor, Tensor]:
    """Token ids [N, LONGEST] and truths [N, LONGEST, 5] of drawn scenes, half of them of two things."""
    rng = np.random.default_rng([0, 0 if split == "train" else 1])
    texts, rows = [], []
    for number in range(count):
        scene = data.random_scene(rng, split, 1 + number % 2)
        clauses, place = data.phrases(scene, rng)
        texts.append(data.sentence(clauses, place))
        rows.append(truths(tokenizer, scene, clauses, texts[-1]))
    return token_ids(tokenizer, texts), torch.stack(rows)


class Reader(nn.Module):
    """The encoder, and the linear layer that tells what was read."""

    def __init__(self) -> None:
        super().__init__()
        self.text = UMT5(TEXT)
        self.head = nn.Linear(TEXT.dim, sum(map(len, CLASSES)))

    def forward(self, ids_NS: Tensor) -> tuple[Tensor, ...]:
        """Logits of each of CLASSES for every token."""
        return self.head(self.text.encode(ids_NS, ids_NS != 0)).split([len(values) for values in CLASSES], dim=-1)


def reading_loss(model: Reader, ids_NS: Tensor, truth_NSC: Tensor) -> Tensor:
    logits = model(ids_NS)
    return sum(
        (nn.functional.cross_entropy(part.flatten(0, 1), truth_NSC[..., place].flatten(), ignore_index=NOTHING)
         for place, part in enumerate(logits)),
        start=torch.zeros((), device=ids_NS.device),
    )  # fmt: skip


@torch.no_grad()
def right(model: Reader, ids_NS: Tensor, truth_NSC: Tensor) -> float:
    """Share of tokens of which every attribute is told right."""
    told = torch.stack([part.argmax(dim=-1) for part in model(ids_NS)], dim=-1)
    asked = truth_NSC != NOTHING
    return float(((told == truth_NSC) | ~asked).all(dim=-1)[asked.any(dim=-1)].float().mean())


def train(steps: int, device: str) -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_path(RUNS / "spiece.model")
    model = Reader().to(device)
    matrices = [
        p for name, p in model.text.named_parameters() if "blocks" in name and p.ndim == 2 and "pos" not in name
    ]
    chosen = {id(p) for p in matrices}
    both = [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in model.parameters() if id(p) not in chosen], lr=RATE),
    ]
    ids, truth = (tensor.to(device) for tensor in captions(12_000, tokenizer, "train"))
    unseen = tuple(tensor.to(device) for tensor in captions(500, tokenizer, "held_out"))
    started = time.perf_counter()
    for step in range(1, steps + 1):
        for optimiser in both:
            loop.set_rate(optimiser, loop.learning_rate(step, steps, RATE, warmup=20))
        rows = torch.randint(len(ids), (BATCH,), device=device)
        loss = reading_loss(model, ids[rows], truth[rows])
        model.zero_grad(set_to_none=True)
        loss.backward()
        for optimiser in both:
            optimiser.step()
        if step % 100 == 0 or step == steps:
            known, seconds = right(model, *unseen), time.perf_counter() - started
            print(f"step {step}  loss {float(loss.detach()):.4f}  held out, right {known:.4f}  {seconds:.0f} s")
    loop.save(CHECKPOINT, {"model": model.text.state_dict()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    train(given.steps, given.device)
