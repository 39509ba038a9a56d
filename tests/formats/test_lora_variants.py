"""LoRA on every variant of Wan: whatever a variant adds changes by the reference formula."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_load import dit_to_diffusers
from torch import Tensor, nn

from checkpoints import write
from kinema.lora import LoraRef
from kinema.models.wan import WanDiT
from kinema.tensors import AnimateConditions, Conditions
from kinema.weights.lora.attach import attach, detach, parameter_shapes, set_strengths
from kinema.weights.lora.file import read_lora
from kinema.weights.lora.fuse import Fusion
from kinema.weights.lora.match import match
from lora_files import random
from parity import test_animate, test_wan_adapters, test_wan_speech

Run = Callable[[WanDiT], Tensor]
ENDINGS = {"bias": ".diff_b", "modulation": ".diff_m"}


def variant(name: str) -> tuple[WanDiT, Run]:
    """The model of a golden, and its velocity for the golden's own inputs; Animate's is smaller."""
    if name == "animate":
        model, x, timesteps = test_animate.small(), random("x", 1, 16, 4, 4, 4), torch.tensor([700.0])
        face = random("face", 1, 3, 9, test_animate.SMALL.face_size, test_animate.SMALL.face_size)
        animate = AnimateConditions(random("pose", 1, 16, 3, 4, 4), face)
        conditions = Conditions((random("text", 3, 8),), animate=animate)
    else:
        module = test_wan_speech if name == "dit_s2v" else test_wan_adapters
        model, x, timesteps, conditions, _ = module.load(name)

    def run(changed: WanDiT) -> Tensor:
        with torch.no_grad():
            return changed(x, timesteps, changed.prepare(conditions))

    return model.requires_grad_(False), run


def lora_of(model: nn.Module, wanted: Callable[[str], bool]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a file holds that changes every parameter `wanted`, and by how much: matrices by LoRA, others whole."""
    state, deltas = {}, {}
    linear = {f"{name}.weight" for name, leaf in model.named_modules() if isinstance(leaf, nn.Linear)}
    for name, tensor in model.named_parameters():
        if not wanted(name):
            continue
        module, _, last = name.rpartition(".")
        if name in linear:
            down, up = random(name + "d", 2, tensor.shape[1]), random(name + "u", len(tensor), 2)
            size = 0.05 * tensor.norm() / (up @ down).norm()
            state |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up * size}
            deltas[name] = size * up @ down
        else:
            deltas[name] = random(name, *tensor.shape) * 0.05 * (tensor.abs().mean() + 1e-3)
            bare = last not in ("weight", "bias", "modulation")
            state[(name if bare else module) + ENDINGS.get(last, ".diff")] = deltas[name]
    return state, deltas


VARIANTS = [*test_wan_adapters.GOLDENS, "dit_s2v", "animate"]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_everything_a_variant_has_changes_by_the_formula(name: str, joined: bool, tmp_path: Path) -> None:
    model, run = variant(name)
    shapes, plain = parameter_shapes(model), run(model)
    inside = lambda key: key.startswith("blocks.")  # noqa: E731
    for wanted in (inside, lambda key: not inside(key)):
        state, deltas = lora_of(model, wanted)
        spelled = {}
        for key, tensor in state.items():
            module, dot, ending = key.partition(next(e for e in (".lora_", ".diff") if e in key))
            prefix = "lora_unet_" if joined else "diffusion_model."
            spelled[prefix + (module.replace(".", "_") if joined else module) + dot + ending] = tensor
        ref = LoraRef(path=write(tmp_path / "x.safetensors", spelled), strength=0.8)
        found = match(read_lora(ref.path), shapes)
        assert not found.unmatched and {change.target for change in found.changes} == deltas.keys()
        changed = copy.deepcopy(model)
        changed.load_state_dict({key: t + 0.8 * deltas.get(key, 0) for key, t in model.state_dict().items()})
        reference = run(changed)
        scale = reference.abs().max()
        assert (reference - plain).abs().max() > 1e-3 * scale, "the LoRA must matter"
        attach(model, [ref], torch.float32)
        set_strengths(model, [0.8])
        assert (run(model) - reference).abs().max() < 2e-5 * scale
        detach(model)
        assert torch.equal(run(model), plain)
        fusion = Fusion([ref], shapes)
        assert all(torch.allclose(fusion(key, t), changed.state_dict()[key], atol=1e-6) for key, t in
                   model.named_parameters() if key in deltas)  # fmt: skip


@pytest.mark.parametrize("name", ["dit_vace", "dit_fun_camera_21"])
def test_matrices_in_diffusers_names(name: str, tmp_path: Path) -> None:
    """VACE's blocks and the image branch under diffusers' names, written by hand."""
    model, run = variant(name)
    state, deltas = lora_of(model, lambda key: key.endswith(".weight"))
    deltas = {key: delta for key, delta in deltas.items() if f"{key.removesuffix('.weight')}.lora_up.weight" in state}
    deltas = {key: delta for key, delta in deltas.items() if not key.startswith("control_adapter")}
    spelled = {}
    for key in deltas:
        (module,) = dit_to_diffusers({key: deltas[key]})
        module = module.replace("before_proj", "proj_in").replace("after_proj", "proj_out").removesuffix(".weight")
        for ours, theirs in (("lora_down", "lora_A"), ("lora_up", "lora_B")):
            spelled[f"transformer.{module}.{theirs}.weight"] = state[f"{key.removesuffix('.weight')}.{ours}.weight"]
    ref = LoraRef(path=write(tmp_path / "x.safetensors", spelled))
    lora = read_lora(ref.path)
    assert lora.dialect == "diffusers" and not match(lora, parameter_shapes(model)).unmatched
    assert {change.target for change in lora.changes} == deltas.keys()
    changed = copy.deepcopy(model)
    changed.load_state_dict({key: t + deltas.get(key, 0) for key, t in model.state_dict().items()})
    attach(model, [ref], torch.float32)
    set_strengths(model, [1.0])
    reference = run(changed)
    assert (run(model) - reference).abs().max() < 2e-5 * reference.abs().max()
