"""Time WanVAE against diffusers' AutoencoderKLWan: the same random weights, float32, eager, interleaved.

    python bench/vae.py --size 256 --frames 17 --rounds 2 [--device cuda] [--chunk 1]

Prints, for encode and decode, the least wall seconds of all rounds, the least CPU seconds (which other work on the
machine disturbs less) and the largest difference of the outputs. Weights are tied through the diffusers key table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from kinema.models.wan_vae import WanVAE, WanVAEConfig
from kinema.weights.files import open_tensors
from kinema.weights.keys import translate


def build(device: str) -> tuple[WanVAE, AutoencoderKLWan]:
    torch.manual_seed(0)
    theirs = AutoencoderKLWan().eval().requires_grad_(False)
    for weight in theirs.parameters():
        if not weight.any():
            weight.normal_(std=0.02)
    with torch.device("meta"):
        ours = WanVAE(WanVAEConfig()).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        save_file(theirs.state_dict(), Path(folder) / "vae.safetensors")
        names = translate(open_tensors(Path(folder) / "vae.safetensors"))
        state = {official: names.read(official).clone() for official in names.sources}
    ours.load_state_dict(state, assign=True)
    return ours.to(device), theirs.to(device)


def timed(function: Callable[[], Tensor], device: str) -> tuple[float, float, Tensor]:
    """Return (wall seconds, CPU seconds, result)."""
    if device != "cpu":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    ours, theirs = build(options.device)
    latent_frames, cells = (options.frames - 1) // 4 + 1, options.size // 8
    video = torch.rand(1, 3, options.frames, options.size, options.size, device=options.device) * 2 - 1
    latents = torch.randn(1, 16, latent_frames, cells, cells, device=options.device)
    cases: dict[str, dict[str, Callable[[], Tensor]]] = {
        "encode": {
            "kinema": lambda: ours.encode(video, options.chunk),
            "diffusers": lambda: ours.normalise(theirs.encode(video).latent_dist.mean),
        },
        "decode": {
            "kinema": lambda: ours.decode(latents, options.chunk).clamp(-1, 1),
            "diffusers": lambda: theirs.decode(ours.denormalise(latents)).sample,
        },
    }
    print(
        f"{options.size}x{options.size}, {options.frames} frames, {torch.get_num_threads()} threads, {options.device}"
    )
    with torch.inference_mode():
        for case, sides in cases.items():
            wall = dict.fromkeys(sides, float("inf"))
            cpu = dict(wall)
            results = {}
            for _ in range(options.rounds):
                for side, function in sides.items():
                    seconds, cpu_seconds, results[side] = timed(function, options.device)
                    wall[side], cpu[side] = min(wall[side], seconds), min(cpu[side], cpu_seconds)
            difference = (results["kinema"] - results["diffusers"]).abs().max().item()
            print(
                f"{case}: kinema {wall['kinema']:.2f} s (CPU {cpu['kinema']:.2f}), "
                f"diffusers {wall['diffusers']:.2f} s (CPU {cpu['diffusers']:.2f}), "
                f"{cpu['diffusers'] / cpu['kinema']:.2f}x CPU, {wall['diffusers'] / wall['kinema']:.2f}x wall, "
                f"largest difference {difference:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
