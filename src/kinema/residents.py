"""Which models stay loaded: as many as fit, the least recently used leaving first.

Owns loaded modules and the hashes of their files. Knows nothing of requests or of the order of verbs.
"""

from __future__ import annotations

import gc
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kinema.lora import LoraRef
from kinema.models.encoders import UMT5, ClipVision, check_encoder
from kinema.models.flux import FluxDiT
from kinema.models.wan import WanDiT
from kinema.planning.memory import leaving
from kinema.runtime.attention import attention
from kinema.runtime.blocks import BlockStream, Ring
from kinema.schema import ModelRef
from kinema.weights.hashes import HashCache
from kinema.weights.load import load, settle
from kinema.weights.lora.attach import attach, check_effect, detach
from kinema.weights.lora.fuse import fusion_of


@dataclass(frozen=True)
class Worn:
    """The LoRAs beside one model's weights: what they are, and the size of each change."""

    key: tuple[object, ...] = ()
    sizes: tuple[float, ...] = ()


def without_branches(ref: ModelRef) -> ModelRef:
    """Return the recipe of what is loaded: LoRAs beside the weights are put there afterwards."""
    return ref.model_copy(update={"loras": (), "lora_bytes": 0}) if ref.lora_mode == "branch" and ref.loras else ref


def _stamp(file: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        stat = file.stat()
        return stat.st_size, stat.st_mtime_ns
    return None


class Residents:
    """Loaded models by recipe, least recently used first. `get` loads what is not there; `clear` drops all.

    LoRAs beside the weights are no part of what is loaded: they are changed on the model that is there.
    """

    def __init__(self) -> None:
        self._modules: OrderedDict[ModelRef, nn.Module] = OrderedDict()
        self._worn: dict[ModelRef, Worn] = {}
        self._rings: dict[str, Ring] = {}
        self._read: dict[Path, tuple[int, int] | None] = {}

    def get(self, ref: ModelRef, need: float = 0, limit: float = 0) -> nn.Module:
        """Return the loaded model of this recipe, with room for `need` bytes of work within `limit` (0: none).

        Others leave for it as planning.memory says. LoRAs beside its weights are at strength 0 until `set_strengths`.
        Raises CheckpointError for a file that does not hold it, MachineError where it cannot be loaded.
        """
        base = without_branches(ref)
        self.make_room(base, need, limit)
        module = self._dressed(ref)
        self._modules.move_to_end(base)
        settle(module, base)
        return module

    def follow(self, ref: ModelRef, following: ModelRef) -> None:
        """Have the first block of `following` fetched, once, while the last one of `ref`, which is loaded, computes.

        Both are streamed. The one that follows takes host memory alone until it is got.
        """
        now, then = (self._dressed(one).run_blocks for one in (ref, following))
        assert isinstance(now, BlockStream) and isinstance(then, BlockStream)
        now.then = then

    def changes(self, ref: ModelRef) -> tuple[float, ...]:
        """Return how large the change that each LoRA makes to a model is; () where the model is not loaded."""
        base = without_branches(ref)
        return self._worn[base].sizes if base in self._modules and base in self._worn else ()

    def make_room(self, ref: ModelRef, need: float, limit: float) -> None:
        """Drop what has to leave before `ref` works."""
        gone = leaving(list(self._modules), [ref], need, limit)
        for other in gone:
            self._worn.pop(other, None)
            runner = getattr(self._modules.pop(other), "run_blocks", None)
            if isinstance(runner, BlockStream):
                runner.close()
        if gone:
            self._release()

    def outdated(self) -> bool:
        """Whether a file that something was loaded from is another one by now."""
        return any(_stamp(file) != before for file, before in self._read.items())

    def __contains__(self, ref: ModelRef) -> bool:
        return without_branches(ref) in self._modules

    def __len__(self) -> int:
        return len(self._modules)

    def clear(self) -> None:
        self._modules.clear()
        self._worn.clear()
        for ring in self._rings.values():
            ring.close()
        self._rings.clear()
        self._read.clear()
        self._release()

    def _dressed(self, ref: ModelRef) -> nn.Module:
        """The loaded model of a recipe with its LoRAs; of a streamed one, what is outside of blocks may yet come."""
        base = without_branches(ref)
        if base not in self._modules:
            self._read |= {file: _stamp(file) for file in (*base.files, *(lora.path for lora in base.loras))}
            self._modules[base] = self._load(base)
        self._wear(base, ref.loras if ref.lora_mode == "branch" else ())
        return self._modules[base]

    def _load(self, ref: ModelRef) -> nn.Module:
        fused = fusion_of(ref)
        module = load(ref, fused)
        if isinstance(module, WanDiT | FluxDiT):
            module.attention = attention(ref.attention, ref.device)
        if isinstance(module, WanDiT):
            module.ffn_tokens = ref.ffn_tokens
        self._stream(ref, module)
        if isinstance(module, UMT5 | ClipVision):
            settle(module, ref)
            check_encoder(module, ref.files[0])
        if fused.sizes:
            check_effect(ref.loras, fused.sizes)
            self._worn[ref] = Worn((), fused.sizes)
        return module

    def _stream(self, ref: ModelRef, module: nn.Module) -> None:
        """Give the model the block runner its recipe asks for."""
        if ref.resident_blocks is None:
            return
        if ref.device not in self._rings:
            self._rings[ref.device] = Ring(ref.device)
        groups = module.block_groups()  # type: ignore[operator]
        runner: Any = BlockStream(groups, self._rings[ref.device], ref.resident_blocks)
        module.run_blocks = runner

    def _wear(self, ref: ModelRef, loras: Sequence[LoraRef]) -> None:
        """Have just these LoRAs beside the weights of a loaded model; the same files and layers stay as they are."""
        key = tuple((lora.path, _stamp(lora.path), lora.only, lora.skip) for lora in loras)
        worn = self._worn.get(ref, Worn())
        if worn.key == key:
            return
        model = self._modules[ref]
        runner = getattr(model, "run_blocks", None)
        if isinstance(runner, BlockStream):
            runner.close()
        try:
            if worn.key:
                self._worn.pop(ref)
                detach(model)
            if key:
                self._worn[ref] = Worn(key, attach(model, loras, getattr(torch, ref.dtype)))
        finally:
            self._stream(ref, model)

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

    def ready(self, files: Iterable[Path], seconds: float = 0.2) -> dict[str, str]:
        """Return the hashes, by path, of those files that are known now or in a moment."""
        known, until = {}, time.monotonic() + seconds
        for file in files:
            with suppress(Exception):  # what is wrong with a file is told when its hash is needed
                known[str(file)] = self._pending[file].result(timeout=max(0.0, until - time.monotonic()))
        return known

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
