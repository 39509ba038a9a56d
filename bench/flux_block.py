"""Time a FLUX transformer of one double and one single block (width 3072) against diffusers', interleaved.

    python bench/flux_block.py --dtype bfloat16 --runs 5

A picture of 512 x 512 (1024 tokens) and 512 rows of text, one step, weights equal. Needs the test extras (diffusers).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from kinema.models.flux import FluxDiT, pack
from kinema.schema import ModelRef
from kinema.tensors import Conditions, FluxConditions
from kinema.weights.detect import inspect
from kinema.weights.load import load

TEXT_ROWS = 512


def build(dtype: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return (ours, theirs): one call, one velocity of the same weights on the same input, packed."""
    torch.manual_seed(0)
    theirs = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flux.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, path)
        facts = inspect(path)
        ours = load(
            ModelRef(
                component=facts.component, files=facts.files, dialect=facts.dialect, container=facts.container,
                config=facts.config, dtype=dtype,
            )
        )  # fmt: skip
        for parameter in ours.parameters():
            parameter.data = parameter.data.clone()  # the file goes
    assert isinstance(ours, FluxDiT)
    theirs = theirs.to(getattr(torch, dtype))
    x, text, pooled = torch.randn(1, 16, 1, 64, 64), torch.randn(TEXT_ROWS, 4096) / 8, torch.randn(1, 768)
    context = ours.prepare(Conditions((text,), flux=FluxConditions(pooled, 3.5)))
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    ids = torch.stack([torch.zeros(1024), rows.flatten(), columns.flatten()], dim=1)
    given = {
        "hidden_states": pack(x).to(theirs.dtype), "encoder_hidden_states": text[None].to(theirs.dtype),
        "pooled_projections": pooled.to(theirs.dtype), "timestep": torch.tensor([0.7]).to(theirs.dtype),
        "img_ids": ids, "txt_ids": torch.zeros(TEXT_ROWS, 3), "guidance": torch.tensor([3.5]), "return_dict": False,
    }  # fmt: skip
    return lambda: pack(ours(x, torch.tensor([700.0]), context)), lambda: theirs(**given)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds: dict[str, list[float]] = {"kinema": [], "diffusers": []}
    with torch.inference_mode():
        sides = dict(zip(seconds, build(options.dtype), strict=True))
        results = {name: call().float() for name, call in sides.items()}
        gap = (results["kinema"] - results["diffusers"]).abs().max() / results["diffusers"].abs().max()
        for _ in range(options.runs):
            for name, call in sides.items():
                begin = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - begin)
    print(f"{options.dtype}, {options.threads} threads; largest difference {gap:.1e} of the largest")
    for name, runs in seconds.items():
        print(f"  {name:10} min {min(runs) * 1e3:7.1f} ms   median {statistics.median(runs) * 1e3:7.1f} ms")


if __name__ == "__main__":
    main()
