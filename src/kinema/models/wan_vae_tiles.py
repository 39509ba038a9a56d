"""Overlapping tiles over a frame, each with its own history, blended linearly where they overlap.

Owns the geometry and the blending; what runs on a tile is the caller's function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from kinema.errors import RequestError
from kinema.models.wan_vae_layers import History

SMALLEST_TILE = 8
"""Latent cells an edge; below, the overlap is too short to hide a seam."""


@dataclass
class Tile:
    """Rows and columns [start, stop) in latent cells, how far its neighbours reach into it, and what it remembers."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    row_overlaps: tuple[int, int] = (0, 0)
    column_overlaps: tuple[int, int] = (0, 0)
    history: History = field(default_factory=History)


def pixel_tiles(height: int, width: int, tile: int | None, stride: int) -> list[Tile]:
    """Cover height x width cells of `stride` pixels with tiles of `tile` pixels an edge; None: with a single one.

    Raises RequestError for a tile that is not whole cells, or too few of them.
    """
    if tile is None:
        return [Tile((0, height), (0, width))]
    smallest = SMALLEST_TILE * stride
    if tile % stride or tile < smallest:
        raise RequestError(
            f"tile {tile} is not a multiple of {stride} from {smallest} up",
            f"pass {max(smallest, round(tile / stride) * stride)}",
            field="tile",
            got=tile,
        )
    return tile_grid(height, width, tile // stride)


def tile_grid(height: int, width: int, tile: int) -> list[Tile]:
    """Cover height x width cells with the fewest tiles of at most `tile` cells an edge that overlap by a quarter."""
    return [
        Tile(rows, columns, row_overlaps, column_overlaps)
        for rows, row_overlaps in spans(height, tile)
        for columns, column_overlaps in spans(width, tile)
    ]


def spans(length: int, tile: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return ((start, stop), (overlap before, overlap after)) of tiles along one axis, all of one size."""
    if tile >= length:
        return [((0, length), (0, 0))]
    overlap = tile // 4
    count = math.ceil((length - overlap) / (tile - overlap))
    # The fewest tiles cover more than the axis: smaller ones do the same work with less.
    size = math.ceil((length + (count - 1) * overlap) / count)
    starts = [i * (length - size) // (count - 1) for i in range(count)]
    shared = [0, *(before + size - after for before, after in pairwise(starts)), 0]
    return [((start, start + size), (shared[i], shared[i + 1])) for i, start in enumerate(starts)]


def run_tiles(
    function: Callable[[Tensor, History], Tensor], x: Tensor, tiles: list[Tile], read: int, write: int, last: bool
) -> Tensor:
    """Return function(x, history) for a whole frame, or its tiles blended.

    read, write   positions of x and of the result that one latent cell spans along an edge.
    last          whether this is the clip's last chunk.
    """
    canvas = None
    for tile in tiles:
        tile.history.last = last
        part = function(crop(x, tile, read), tile.history)
        if len(tiles) == 1:
            return part
        tile.history.park()
        if canvas is None:
            height, width = (x.shape[axis] // read * write for axis in (3, 4))
            canvas = part.new_zeros(*part.shape[:3], height, width)
        crop(canvas, tile, write).add_(part * mask(tile, write, part.device))
    assert canvas is not None
    return canvas


def crop(x: Tensor, tile: Tile, cell: int) -> Tensor:
    (top, bottom), (left, right) = tile.rows, tile.columns
    return x[..., top * cell : bottom * cell, left * cell : right * cell]


def mask(tile: Tile, cell: int, device: torch.device) -> Tensor:
    """Weights [H, W] of a tile; those of all tiles sum to one everywhere."""
    rows = ramp(tile.rows[1] - tile.rows[0], tile.row_overlaps, cell, device)
    columns = ramp(tile.columns[1] - tile.columns[0], tile.column_overlaps, cell, device)
    return rows[:, None] * columns


def ramp(size: int, overlaps: tuple[int, int], cell: int, device: torch.device) -> Tensor:
    """Weights along one axis: up over the overlap before, one, down over the overlap after."""
    weights = torch.ones(size * cell, device=device)
    before, after = (overlap * cell for overlap in overlaps)
    weights[:before] *= (torch.arange(before, device=device) + 0.5) / max(before, 1)
    weights[len(weights) - after :] *= 1 - (torch.arange(after, device=device) + 0.5) / max(after, 1)
    return weights
