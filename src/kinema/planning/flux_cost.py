"""Operations and bytes of FLUX.1's transformer and autoencoder: the rows of cost.py that are its own.

Pure arithmetic over configurations; tests/unit/test_cost.py counts the layers' real operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from kinema.planning.activations import HEAD_DIM, tile_cells

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


def transformer_bytes(config: Config, tokens: int, text_rows: int, dtype_bytes: int, *, branches: int = 1) -> float:
    """Return bytes above the weights at the fullest moment of a forward.

    That is in a single block, of all rows, where attention and hidden rows join; or in a double one, whose image rows
    pass their feed-forward while queries, keys and values of both streams are still there.
    branches   of guidance whose rows pass a block together.
    """
    d, mlp, h = config["dim"], config["mlp_dim"], dtype_bytes
    real = 4 if h == 2 else 8  # what a rotation computes in
    rows = tokens + text_rows
    single = 8 * d + max(h * (7 * d + 3 * mlp), h * (7 * d + mlp) + 2 * real * d)
    double = rows * (4 + 9 * h) * d + tokens * (8 * d + h * d + 2 * h * mlp)
    waiting = 4 * d + 2 * real * HEAD_DIM  # the stream of a branch, with its rotations
    return float(max(rows * single, double) + branches * rows * waiting - rows * 4 * d)


def autoencoder_flops(config: Config, cells: int, *, decoder: bool) -> float:
    """Return FLOPs of decoding (or encoding) `cells` latent cells, the middle attention included."""
    convolutions = sum(2 * i * o * taps * area for i, o, taps, area in _convolutions(config, decoder))
    deepest = config["dim"] * config["dim_mult"][-1]
    return float(cells * (convolutions + 8 * deepest**2 + 4 * deepest * cells))


def autoencoder_bytes(
    config: Config, rows: int, columns: int, dtype_bytes: int, *, decoder: bool, tile: int | None = None
) -> float:
    """Return bytes above the weights at the fullest layer, for latents of rows x columns.

    tile   edge in latent cells of the tiles they are cut into.
    """
    cells = tile_cells(rows, tile) * tile_cells(columns, tile)
    scale = 2 ** (len(config["dim_mult"]) - 1)
    picture = 4 * 3 * rows * columns * scale**2  # once beside the fullest layer; four copies on its way in or out
    return float(max(cells * dtype_bytes * max(_moments(config, decoder)) + picture, 4 * picture))


def _moments(config: Config, decoder: bool) -> Iterator[float]:
    """Yield what is alive level by level, in values for each latent cell. What enters a level lives until its end."""
    mult, count = config["dim_mult"], config["num_res_blocks"] + decoder
    levels = [config["dim"] * m for m in mult]
    dims = [levels[-1], *reversed(levels)] if decoder else [levels[0], *levels]
    area = 1.0 if decoder else 4.0 ** (len(mult) - 1)
    for level, (entered, dim) in enumerate(pairwise(dims)):
        yield area * max(3 * entered, entered + 3 * dim)
        if count > 1:
            yield area * (entered + 4 * dim)
        if level < len(mult) - 1:
            yield area * (entered + dim * (9 if decoder else 2.25))
            area *= 4 if decoder else 0.25


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
