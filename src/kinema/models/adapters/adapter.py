"""What every adapter of the Wan DiT is: three hooks around a forward pass, and children with official names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from kinema.models.wan_blocks import Context, Stream

if TYPE_CHECKING:
    from kinema.models.wan import WanDiT


class Adapter(nn.Module):
    """An addition to a WanDiT, which registers the adapter's children as its own, under the same names.

    All tensors are held by children: the keys of the model's state dict are then those of the checkpoint. An adapter
    keeps nothing between calls; `state` is whatever its own `prepare` returned.
    """

    field: str
    """Of Conditions: what this adapter is told."""

    def prepare(self, model: WanDiT, told: Sequence[Any]) -> Sequence[Any]:
        """Return all that is constant over the steps of a request, of each guidance branch that asks for this adapter.

        told   what each is told; `layers.map_once` finds what is the same object in several.
        """
        raise NotImplementedError

    def embed(self, model: WanDiT, stream: Stream, state: Any) -> Stream:
        """Return the stream that enters the blocks: added to, with tokens in front or behind, or a second stream."""
        return stream

    def after_block(self, index: int, stream: Stream, context: Context, state: Any) -> Stream:
        """Return the stream that leaves main block `index`."""
        return stream

    def companions(self, index: int) -> Iterable[nn.Module]:
        """Modules that `after_block(index, ...)` runs: what moves weights moves them together with that block."""
        return ()
