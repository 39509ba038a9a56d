"""LoRA from request to video, on real files: every spelling the same video, swaps, strengths by step, replay."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import kinema.residents
from checkpoints import official_state, write
from kinema.engine import Engine
from kinema.errors import CatalogError, CheckpointError, RequestError
from kinema.lora import LoraRef
from kinema.media.metadata import read_metadata
from kinema.schema import Note, Plan, Request, Result
from lora_files import ALGORITHMS, SPELLINGS, Written, low_rank, random, write_lora
from tiny_world import DITS, TinyWorld

SHAPES = {name: tuple(tensor.shape) for name, tensor in official_state("dit", DITS["t2v"]).items()}
LORA = low_rank(SHAPES)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {name: write_lora(folder / f"{name}.safetensors", name, LORA) for name in SPELLINGS}


@pytest.fixture
def make(engine: Engine, tmp_path: Path):
    """Run a request and return its latents and result."""
    number = iter(range(1000))

    def run(model: str = "tiny-t2v", **fields: Any) -> tuple[Tensor, Result]:
        save = tmp_path / f"{next(number)}.latents.safetensors"
        asked = {"prompt": "a cat walks", "seed": 3, "save": save, "precision": "reference", "device": "cpu"}
        request = Request(model=model, **{**asked, **fields})
        (result,) = (event for event in engine.run(engine.plan(request)) if isinstance(event, Result))
        return load_file(result.paths[0])["latents"], result

    return run


@pytest.fixture(scope="module")
def reference(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory):
    """Latents of the same request on a DiT file whose weights were changed by the reference formula."""

    def run(*changes: tuple[Written, float], high: float = 0.0, model: str = "tiny-t2v") -> Tensor:
        folder = tmp_path_factory.mktemp("reference")
        files = {}
        for role, salt, extra in (("dit", 11, 0.0), ("dit_high", 21, high)):
            state = official_state("dit", DITS["t2v"], salt=salt)
            for lora, strength in changes if role == "dit" else [(LORA, extra)]:
                for name, delta in lora.deltas().items():
                    state[name] = state[name] + strength * delta
            files[role] = write(folder / f"{role}.safetensors", state)
        if model == "tiny-t2v":
            files.pop("dit_high")
        request = Request(model=model, prompt="a cat walks", seed=3, save=folder / "x.latents.safetensors",
                          precision="reference", device="cpu", **files)  # fmt: skip
        with Engine(tiny_world.settings) as engine:
            (result,) = (event for event in engine.run(engine.plan(request)) if isinstance(event, Result))
        return load_file(result.paths[0])["latents"]

    return run


def close(got: Tensor, want: Tensor) -> bool:
    return float((got - want).abs().max() / want.abs().max()) < 2e-5


def test_every_spelling_gives_the_video_of_the_reference_formula(make, reference, loras: dict[str, Path]) -> None:
    want = reference((LORA, 0.7))
    plain, _ = make()
    assert not close(plain, want)
    for name, path in loras.items():
        got, result = make(lora=f"{path}:0.7")
        assert close(got, want), name
        (report,) = result.plan.loras
        assert (report.matched, report.total) == (20, 20) and report.change and report.change > 0.01
        assert result.plan.hashes[str(path)]
    again, _ = make()
    assert torch.equal(again, plain), "the model itself must be as it was"


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "lora"])
def test_beside_the_weights_equals_fused_into_them(algorithm: str, make, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if algorithm == "lora":
        write_lora(path, "kohya", LORA)
    else:
        tensors, _ = ALGORITHMS[algorithm]("blocks.0.self_attn.q", 128, 128)
        write(path, {f"diffusion_model.blocks.0.self_attn.q.{name}": tensor for name, tensor in tensors.items()})
    plain, _ = make()
    beside, first = make(lora=f"{path}:0.8")
    fused, second = make(lora=f"{path}:0.8", lora_mode="fuse")
    assert close(beside, fused) and not close(beside, plain)
    assert first.plan.loras[0].change == pytest.approx(second.plan.loras[0].change, rel=1e-4)


def test_each_expert_has_its_own_strength(make, reference, loras: dict[str, Path]) -> None:
    path = loras["comfyui"]
    got, result = make("tiny-t2v-two", lora=[f"{path}:0.9@high", f"{path}:0.3@low"])
    assert close(got, reference((LORA, 0.3), high=0.9, model="tiny-t2v-two"))
    assert [report.expert for report in result.plan.loras] == ["high", "low"]


def test_strength_by_steps_equals_switching_by_hand(make, reference, loras: dict[str, Path]) -> None:
    path = loras["kohya"]
    whole, _ = make(lora=f"{path},steps=1-2")
    assert close(whole, reference((LORA, 1.0)))
    first, _ = make(lora=f"{path},steps=1")
    second, _ = make(lora=f"{path},steps=2")
    assert not close(first, whole) and not close(second, whole) and not close(first, second)
    both, _ = make(lora=[f"{path},steps=1", f"{path},steps=2"])
    assert close(both, whole)
    none, _ = make(lora=f"{path}:0")
    assert torch.equal(none, make()[0])


def test_swapping_keeps_the_model_loaded_and_its_weights_bit_identical(
    engine: Engine, make, loras: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffs = {f"diffusion_model.{name}": random(name, *SHAPES[target])
             for name, target in (("blocks.0.norm3.diff", "blocks.0.norm3.weight"),
                                  ("blocks.1.diff_m", "blocks.1.modulation"))}  # fmt: skip
    other = write(tmp_path / "diffs.safetensors", diffs)
    _, result = make()
    model = engine._models.get(result.plan.experts["model"])
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.named_parameters()}
    monkeypatch.setattr(kinema.residents, "load", lambda *_: pytest.fail("a swap of LoRA must load no weight"))
    for _ in range(3):
        make(lora=f"{loras['kohya']}")
        make(lora=[f"{other}", f"{loras['peft']}:0.5"])
    make()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (identity, tensor) in before.items():
        assert id(after[name]) == identity and torch.equal(after[name], tensor), name


def test_a_lora_file_that_changed_is_read_again(make, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x.safetensors", "official", LORA)
    first, _ = make(lora=str(path))
    stamp = path.stat().st_mtime_ns
    write_lora(path, "official", low_rank(SHAPES, scale=2.0))
    os.utime(path, ns=(stamp + 1, stamp + 1))
    assert not close(make(lora=str(path))[0], first)


def test_a_lora_file_that_went_away_after_planning_is_named(engine: Engine, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x.safetensors", "official", LORA)
    plan = engine.plan(Request(model="tiny-t2v", prompt="a cat", save=tmp_path / "x.mp4", device="cpu", lora=str(path)))
    path.unlink()
    with pytest.raises(CheckpointError, match=r"x\.safetensors does not exist"):
        list(engine.run(plan))


def test_the_report_is_told_and_carried_by_the_video(engine: Engine, loras: dict[str, Path], tmp_path: Path) -> None:
    save = tmp_path / "x.mp4"
    request = Request(model="tiny-t2v", prompt="a cat walks", seed=3, save=save, device="cpu",
                      lora=f"{loras['lightx2v']}:0.5")  # fmt: skip
    told = [event.text for event in engine.run(engine.plan(request)) if isinstance(event, Note)]
    (report,) = (text for text in told if "parts matched" in text)
    assert "20 of 20 parts matched (lightx2v names, 20 lora, rank 4), strength 0.5" in report and "%" in report
    carried = Plan.model_validate_json(read_metadata(save)["kinema"])
    assert carried.loras[0].change and carried.request.lora == request.lora


def test_one_renamed_key_is_refused(engine: Engine, tmp_path: Path) -> None:
    state = SPELLINGS["comfyui"](LORA)
    state["diffusion_model.blocks.1.mlp.0.lora_A.weight"] = state.pop("diffusion_model.blocks.1.ffn.0.lora_A.weight")
    path = write(tmp_path / "x.safetensors", state)
    with pytest.raises(RequestError, match="19 of 21 parts"):
        engine.plan(Request(model="tiny-t2v", prompt="a cat", lora=str(path)))


def test_names_in_the_loras_folder_and_missing_ones(engine: Engine, tiny_world: TinyWorld) -> None:
    path = write_lora(tiny_world.root / "loras/sub/found.safetensors", "official", LORA)
    made = engine.plan(Request(model="tiny-t2v", prompt="a cat", lora="sub/found.safetensors:0.5"))
    assert made.experts["model"].loras == (LoraRef(path=path, strength=0.5),)
    with pytest.raises(CatalogError, match="no such file") as caught:
        engine.plan(Request(model="tiny-t2v", prompt="a cat", lora="lost.safetensors:O.5"))
    assert "STRENGTH" in caught.value.hint


@pytest.mark.parametrize("swapped", [1, 2])
def test_streamed_blocks_carry_their_loras(swapped: int, make, loras: dict[str, Path], tmp_path: Path) -> None:
    """Blocks that pass through two slots of memory, with and without LoRA, swapped: the resident ones' latents."""
    diffs = write(tmp_path / "d.safetensors", {"diffusion_model.blocks.1.diff_m": random("m", 1, 6, 128),
                                               "diffusion_model.blocks.0.norm3.diff": random("n", 128)})  # fmt: skip
    cases = ((), (f"{loras['kohya']}:0.7",), (str(diffs), f"{loras['peft']},steps=2"), ())
    for case in cases:
        resident, _ = make(lora=list(case))
        streamed, result = make(lora=list(case), blocks_to_swap=swapped)
        assert torch.equal(streamed, resident), case
        assert result.plan.experts["model"].resident_blocks == 2 - swapped


@pytest.mark.parametrize("more", [{}, {"blocks_to_swap": 1}])
def test_a_broken_lora_ends_its_own_run_alone(
    more: dict[str, int], make, loras: dict[str, Path], tmp_path: Path
) -> None:
    state = SPELLINGS["comfyui"](LORA)
    state["diffusion_model.blocks.1.ffn.2.lora_A.weight"] = torch.full((4, DITS["t2v"]["ffn_dim"]), float("nan"))
    broken = write(tmp_path / "broken.safetensors", state)
    plain, with_lora = make(**more)[0], make(lora=str(loras["kohya"]), **more)[0]
    with pytest.raises(CheckpointError, match="not finite"):
        make(lora=[str(loras["kohya"]), str(broken)], **more)
    assert torch.equal(make(**more)[0], plain)
    assert torch.equal(make(lora=str(loras["kohya"]), **more)[0], with_lora)


@pytest.mark.parametrize("mode", ["branch", "fuse"])
def test_a_lora_that_would_do_nothing_is_refused(mode: str, make, tmp_path: Path) -> None:
    """All zero in `up`, as it is before the first step of training: matched wholly, and without any effect."""
    state = {n: t * (0 if "lora_B" in n else 1) for n, t in SPELLINGS["comfyui"](LORA).items()}
    path = write(tmp_path / "x.safetensors", state)
    with pytest.raises(CheckpointError, match="changes nothing"):
        make(lora=str(path), lora_mode=mode)
    assert torch.equal(make()[0], make()[0])
