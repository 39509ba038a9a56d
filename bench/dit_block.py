"""Time one Wan 1.3B-width DiT block (dim 1536, ffn 8960) against diffusers' on the same input, interleaved.

    python bench/dit_block.py --dtype bfloat16 --runs 5

Both sides: weights equal, a prompt of 100 tokens padded to 512, one timestep. Ours has the keys and values of the text
ready (they are computed once per request); --text 512 leaves no padding to merge. Needs the test extras (diffusers).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from torch import Tensor

from kinema.models.layers import rope_at, sdpa
from kinema.models.wan import Block, Context, Stream, WanConfig, pad_texts, stays_float32
from kinema.models.wan_blocks import KVCache

GRID = (5, 16, 16)
CONFIG = WanConfig(dim=1536, ffn_dim=8960, num_layers=1, in_channels=16, out_channels=16)
RENAMES = (
    ("self_attn.", "attn1."), ("cross_attn.", "attn2."), ("norm3.", "norm2."), ("modulation", "scale_shift_table"),
    (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."), (".o.", ".to_out.0."), ("ffn.0.", "ffn.net.0.proj."),
    ("ffn.2.", "ffn.net.2."),
)  # fmt: skip


def build(dtype: torch.dtype, text_tokens: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return (ours, theirs): one call, one block forward of the same weights on the same input."""
    torch.manual_seed(0)
    ours = Block(CONFIG).eval()
    theirs = WanTransformerBlock(CONFIG.dim, CONFIG.ffn_dim, CONFIG.num_heads, cross_attn_norm=True).eval()
    weights = {}
    for name, tensor in ours.state_dict().items():
        for old, new in RENAMES:
            name = name.replace(old, new)
        weights[name] = tensor
    theirs.load_state_dict(weights)
    for name, parameter in ours.named_parameters():
        if not stays_float32("blocks.0." + name):
            parameter.data = parameter.data.to(dtype)
    for name, parameter in theirs.named_parameters():
        if name != "scale_shift_table" and not name.startswith("norm2."):
            parameter.data = parameter.data.to(dtype)

    tokens_BLD = torch.randn(1, GRID[0] * GRID[1] * GRID[2], CONFIG.dim)
    modulation_BR6D = torch.randn(1, 1, 6, CONFIG.dim) * 0.2
    text = torch.randn(text_tokens, CONFIG.dim)
    text_BSD, bias_1S = pad_texts((text,), 512)
    full_BSD = torch.nn.functional.pad(text, (0, 0, 0, 512 - text_tokens))[None].to(dtype)
    context = Context(KVCache(text_BSD), text_bias_1S=bias_1S)
    complex_dtype = torch.complex128 if dtype == torch.float32 else torch.complex64
    rope_LK = rope_at(tuple(map(range, GRID)), CONFIG.head_dim, dtype=complex_dtype, device=torch.device("cpu"))
    stream = Stream(tokens_BLD, modulation_BR6D[:, :, 0], modulation_BR6D, (tokens_BLD.shape[1],), rope_LK, GRID, sdpa)
    latents = torch.zeros(1, 16, GRID[0], GRID[1] * 2, GRID[2] * 2)
    rotary = WanRotaryPosEmbed(CONFIG.head_dim, (1, 2, 2), 1024)(latents)
    tokens_theirs = tokens_BLD.to(dtype)
    return (
        lambda: ours(stream, context, 0).tokens_BLD,
        lambda: theirs(tokens_theirs, full_BSD, modulation_BR6D[:, 0], rotary),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--text", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds: dict[str, list[float]] = {"kinema": [], "diffusers": []}
    with torch.inference_mode():
        sides = dict(zip(seconds, build(getattr(torch, options.dtype), options.text), strict=True))
        results = {name: call().float() for name, call in sides.items()}
        gap = (results["kinema"] - results["diffusers"]).abs().max() / results["diffusers"].abs().max()
        for _ in range(options.runs):
            for name, call in sides.items():
                begin = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - begin)
    print(
        f"{options.dtype}, {options.threads} threads, text {options.text}; largest difference {gap:.1e} of the largest"
    )
    for name, runs in seconds.items():
        print(f"  {name:10} min {min(runs) * 1e3:7.1f} ms   median {statistics.median(runs) * 1e3:7.1f} ms")


if __name__ == "__main__":
    main()
