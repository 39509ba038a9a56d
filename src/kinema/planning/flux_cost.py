"""Operations and bytes of FLUX.1's transformer and autoencoder: the rows of cost.py that are its own.

Pure arithmetic over configurations; tests/unit/test_cost.py counts the layers' real operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

Config = Mapping[str, Any]


def is_flux(config: Config) -> bool:
    """Whether this is the configuration of FLUX's transformer or autoencoder, and not of Wan's."""
    return "num_double" in config or ("z_dim" in config and "version" not in config)


def transformer_flops(config: Config, tokens: int, text_rows: int) -> float:
    """Return FLOPs of one forward over `tokens` of images and `text_rows` of text."""
    d, mlp = config["dim"], config["mlp_dim"]
    rows = tokens + text_rows
    attention = 4 * rows**2 * d
    double = config["num_double"] * (rows * (8 * d * d + 4 * d * mlp) + attention + 24 * d * d)
    single = config["num_single"] * (rows * (8 * d * d + 4 * d * mlp) + attention + 6 * d * d)
    edges = 8 * tokens * d * (config["in_channels"] + config["out_channels"])
    return float(double + single + edges + 4 * d * d + 2 * d * (256 + d))


def transformer_bytes(config: Config, tokens: int, text_rows: int, dtype_bytes: int) -> float:
    """Return bytes above the weights at the fullest moment of a forward: a single block's fused matrices."""
    d, mlp = config["dim"], config["mlp_dim"]
    row = 12 * d + (3 * d + mlp) * dtype_bytes + (d + 2 * mlp) * dtype_bytes + 8 * d
    return float((tokens + text_rows) * row)


def autoencoder_flops(config: Config, cells: int, *, decoder: bool) -> float:
    """Return FLOPs of decoding (or encoding) `cells` latent cells, the middle attention included."""
    convolutions = sum(2 * i * o * taps * area for i, o, taps, area in _convolutions(config, decoder))
    deepest = config["dim"] * config["dim_mult"][-1]
    return float(cells * (convolutions + 8 * deepest**2 + 4 * deepest * cells))


def autoencoder_bytes(config: Config, cells: int, dtype_bytes: int, *, decoder: bool) -> float:
    """Return bytes above the weights at the fullest layer: a block's input, its norm, and its output."""
    fullest = max(area * (2 * i + o) for i, o, _, area in _convolutions(config, decoder))
    return float(1.5 * cells * dtype_bytes * fullest)


def _convolutions(config: Config, decoder: bool) -> Iterator[tuple[int, int, int, int]]:
    """Yield (in, out, taps, positions a latent cell) of every convolution but the attention's."""
    mult, base, z, count = config["dim_mult"], config["dim"], config["z_dim"], config["num_res_blocks"]
    levels = [base * m for m in mult]
    dims = [levels[-1], *reversed(levels)] if decoder else [base, *levels]
    area = 1 if decoder else 4 ** (len(mult) - 1)
    if decoder:
        yield z, dims[0], 9, 1
        yield from [(dims[0], dims[0], 9, 1)] * 4
    else:
        yield 3, dims[0], 9, area
    for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
        for _ in range(count + decoder):
            yield in_dim, out_dim, 9, area
            yield out_dim, out_dim, 9, area
            if in_dim != out_dim:
                yield in_dim, out_dim, 1, area
            in_dim = out_dim
        if level < len(mult) - 1:
            area = area * 4 if decoder else area // 4
            yield out_dim, out_dim, 9, area
    if decoder:
        yield dims[-1], 3, 9, area
    else:
        yield from [(dims[-1], dims[-1], 9, 1)] * 4
        yield dims[-1], 2 * z, 9, 1
