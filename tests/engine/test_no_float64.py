"""Whole runs on a device without float64, such as Apple's: no tensor of such numbers is ever made there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpoints import official_state
from kinema.engine import Engine
from kinema.models import layers, wan
from kinema.models.adapters import speech
from kinema.schema import Request, Result, Settings
from kinema.weights.lora import branches
from lora_files import low_rank, write_lora
from speech_world import inputs
from tiny_world import DITS, TinyWorld, picture

LACKING = (torch.float64, torch.complex128)
MEDIA = {
    "tiny-t2v": (),
    "tiny-clip": ("first",),
    "tiny-ti2v": ("first",),
    "tiny-vace": ("reference",),
    "tiny-control22": ("control", "reference"),
}


class WithoutFloat64(TorchDispatchMode):
    """Refuses what MPS refuses. Scalars count too: they become tensors on the device."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            assert not (isinstance(leaf, torch.Tensor) and leaf.dtype in LACKING), f"{operation} makes {leaf.dtype}"
        return out


@pytest.fixture
def as_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layers, wan, speech, branches):
        monkeypatch.setattr(module, "finest", lambda device: torch.float32)


def run(settings: Any, **fields: Any) -> Result:
    with Engine(settings) as engine, WithoutFloat64():
        plan = engine.plan(Request(prompt="a cat walks", seed=3, device="cpu", **fields))
        (result,) = (event for event in engine.run(plan) if isinstance(event, Result))
    return result


@pytest.mark.parametrize("precision", ["reference", "fast"])
@pytest.mark.parametrize("model", MEDIA)
def test_runs_make_none(as_on_mps: None, tiny_world: TinyWorld, tmp_path: Path, model: str, precision: str) -> None:
    media = {role: picture(tmp_path / f"{role}.png") for role in MEDIA[model]}
    frames = {"frames": 1} if "control" in media else {}
    run(tiny_world.settings, model=model, precision=precision, save=tmp_path / "out.gif", **media, **frames)


def test_speech_makes_none(as_on_mps: None, speech_settings: Settings, tmp_path: Path) -> None:
    run(speech_settings, model="tiny-s2v", save=tmp_path / "out.gif", **inputs(tmp_path, 0.5))


@pytest.mark.parametrize("mode", ["branch", "fuse"])
def test_loras_make_none(as_on_mps: None, tiny_world: TinyWorld, tmp_path: Path, mode: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in official_state("dit", DITS["t2v"]).items()}
    lora = write_lora(tmp_path / "style.safetensors", "comfyui", low_rank(shapes))
    run(tiny_world.settings, model="tiny-t2v", lora=str(lora), lora_mode=mode, save=tmp_path / "out.gif")


def test_the_trap_catches_what_reference_precision_does_elsewhere(tiny_world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="makes torch"):
        run(tiny_world.settings, model="tiny-t2v", precision="reference", save=tmp_path / "out.gif")
