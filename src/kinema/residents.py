"""Which models stay loaded: as many as fit, the least recently used leaving first.

Owns loaded modules and the hashes of their files. Knows nothing of requests or of the order of verbs.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from kinema.models.encoders import UMT5, ClipVision, check_encoder
from kinema.models.wan import WanDiT
from kinema.runtime.attention import attention
from kinema.runtime.machine import free_memory
from kinema.schema import ModelRef
from kinema.weights.hashes import HashCache
from kinema.weights.load import load

HEADROOM = 0.9
"""Share of the free memory that models may take; activations need the rest."""


class Residents:
    """Loaded models by recipe. `get` loads what is not there, making room first; `clear` drops all."""

    def __init__(self) -> None:
        self._modules: OrderedDict[ModelRef, nn.Module] = OrderedDict()

    def get(self, ref: ModelRef) -> nn.Module:
        """Return the loaded model of this recipe.

        Raises CheckpointError for a file that does not hold it, MachineError where it cannot be loaded.
        """
        if ref not in self._modules:
            self._make_room(ref)
            module = load(ref)
            if isinstance(module, UMT5 | ClipVision):
                check_encoder(module, ref.files[0])
            if isinstance(module, WanDiT):
                module.attention = attention(ref.attention, ref.device)
            self._modules[ref] = module
        self._modules.move_to_end(ref)
        return self._modules[ref]

    def __contains__(self, ref: ModelRef) -> bool:
        return ref in self._modules

    def clear(self) -> None:
        self._modules.clear()
        self._release()

    def _make_room(self, ref: ModelRef) -> None:
        while self._modules and ref.weight_bytes > HEADROOM * free_memory(ref.device):
            self._modules.popitem(last=False)
            self._release()

    def _release(self) -> None:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


class BackgroundHashes:
    """sha256 of the files of a plan, computed beside the work and remembered by path, size and time."""

    def __init__(self, cache: Path | None) -> None:
        self._cache = HashCache(cache / "hashes.json" if cache else None)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash")
        self._pending: dict[Path, Future[str]] = {}

    def begin(self, files: Iterable[Path]) -> None:
        """Start hashing these files; returns at once. A file that is known and unchanged costs a look at its time."""
        for file in files:
            self._pending[file] = self._pool.submit(self._cache.sha256, file)

    def collect(self, files: Iterable[Path]) -> dict[str, str]:
        """Return the hash of each file by its path, waiting for those under way."""
        return {str(file): self._pending[file].result() for file in files}

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
