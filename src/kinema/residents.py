"""Which models stay loaded: as many as fit, the least recently used leaving first.

Owns loaded modules and the hashes of their files. Knows nothing of requests or of the order of verbs.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kinema.lora import LoraRef
from kinema.models.encoders import UMT5, ClipVision, check_encoder
from kinema.models.flux import FluxDiT
from kinema.models.wan import WanDiT
from kinema.runtime.attention import attention
from kinema.runtime.machine import free_memory
from kinema.schema import ModelRef
from kinema.weights.hashes import HashCache
from kinema.weights.load import load
from kinema.weights.lora.attach import attach, detach
from kinema.weights.lora.fuse import fusion_of

HEADROOM = 0.9
"""Share of the free memory that models may take; activations need the rest."""


@dataclass(frozen=True)
class Worn:
    """The LoRAs beside one model's weights: what they are, and the size of each change."""

    key: tuple[object, ...] = ()
    sizes: tuple[float, ...] = ()


def without_branches(ref: ModelRef) -> ModelRef:
    """Return the recipe of what is loaded: LoRAs beside the weights are put there afterwards."""
    return ref.model_copy(update={"loras": ()}) if ref.lora_mode == "branch" and ref.loras else ref


class Residents:
    """Loaded models by recipe. `get` loads what is not there, making room first; `clear` drops all.

    LoRAs beside the weights are no part of what is loaded: they are changed on the model that is there.
    """

    def __init__(self) -> None:
        self._modules: OrderedDict[ModelRef, nn.Module] = OrderedDict()
        self._worn: dict[ModelRef, Worn] = {}

    def get(self, ref: ModelRef) -> nn.Module:
        """Return the loaded model of this recipe.

        LoRAs beside its weights are at strength 0 until `set_strengths`.
        Raises CheckpointError for a file that does not hold it, MachineError where it cannot be loaded.
        """
        loras, ref = ref.loras if ref.lora_mode == "branch" else (), without_branches(ref)
        if ref not in self._modules:
            self._make_room(ref)
            fused = fusion_of(ref)
            module = load(ref, fused)
            if isinstance(module, UMT5 | ClipVision):
                check_encoder(module, ref.files[0])
            if isinstance(module, WanDiT | FluxDiT):
                module.attention = attention(ref.attention, ref.device)
            self._modules[ref] = module
            if fused.sizes:
                self._worn[ref] = Worn((), fused.sizes)
        self._modules.move_to_end(ref)
        self._wear(ref, loras)
        return self._modules[ref]

    def changes(self, ref: ModelRef) -> tuple[float, ...]:
        """Return how large the change that each LoRA makes to a model is; () where the model is not loaded."""
        base = without_branches(ref)
        return self._worn[base].sizes if base in self._modules and base in self._worn else ()

    def __contains__(self, ref: ModelRef) -> bool:
        return without_branches(ref) in self._modules

    def clear(self) -> None:
        self._modules.clear()
        self._worn.clear()
        self._release()

    def _wear(self, ref: ModelRef, loras: Sequence[LoraRef]) -> None:
        """Have just these LoRAs beside the weights of a loaded model; the same files and layers stay as they are."""
        key = tuple((lora.path, lora.path.stat().st_mtime_ns, lora.only, lora.skip) for lora in loras)
        worn = self._worn.get(ref, Worn())
        if worn.key == key:
            return
        model = self._modules[ref]
        if worn.key:
            self._worn.pop(ref)
            detach(model)
        if key:
            self._worn[ref] = Worn(key, attach(model, loras, getattr(torch, ref.dtype)))

    def _make_room(self, ref: ModelRef) -> None:
        while self._modules and ref.weight_bytes > HEADROOM * free_memory(ref.device):
            self._worn.pop(self._modules.popitem(last=False)[0], None)
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
