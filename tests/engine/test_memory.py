"""Memory that is planned, then kept: streamed runs give the bits of resident ones, and overrides do what they say."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.test_lora_runs import SHAPES
from engine.test_quantised_runs import write_fp8
from kinema.engine import Engine
from kinema.residents import Residents
from kinema.runtime.blocks import BlockStream, Ring, Unit
from kinema.schema import Request, Result
from kinema.weights.load import load, settle
from lora_files import low_rank, write_lora
from tiny_world import TinyWorld, picture

MODELS = {"tiny-t2v": (), "tiny-t2v-two": (), "tiny-i2v-two": ("first",), "tiny-clip": ("first",), "tiny-ti2v": ()}


@pytest.fixture
def latents(engine: Engine, tmp_path: Path):
    """Latents of a request; media of the model are made up."""

    return partial(run, engine, tmp_path)


def request(model: str, folder: Path, **fields: object) -> Request:
    media = {role: picture(folder / f"{role}.png") for role in MODELS[model]}
    save = folder / "x.latents.safetensors"
    return Request(
        model=model, prompt="a cat walks", seed=3, device="cpu", save=save, overwrite=True, **media, **fields
    )


def run(engine: Engine, folder: Path, model: str, **fields: object) -> torch.Tensor:
    (result,) = (e for e in engine.run(engine.plan(request(model, folder, **fields))) if isinstance(e, Result))
    return load_file(result.paths[0])["latents"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["fast", "reference"])
def test_streaming_at_every_level_gives_the_bits_of_staying(
    latents, engine: Engine, model: str, precision: str
) -> None:
    want = latents(model, precision=precision)
    for swap in (1, 2):
        assert torch.equal(latents(model, precision=precision, blocks_to_swap=swap), want)
        runners = [module.run_blocks for module in engine._models._modules.values() if hasattr(module, "attention")]
        assert sum(isinstance(runner, BlockStream) for runner in runners) >= 1


@pytest.mark.parametrize("place", ["device", "streamed", "cpu"])
def test_the_text_encoder_gives_the_same_bits_wherever_it_runs(latents, engine: Engine, place: str) -> None:
    engine._texts.clear()
    want = latents("tiny-t2v")
    engine._texts.clear()
    assert torch.equal(latents("tiny-t2v", text_encoder_on=place), want)


def test_a_feed_forward_in_parts_changes_next_to_nothing(latents) -> None:
    want = latents("tiny-t2v", precision="reference")
    assert torch.allclose(latents("tiny-t2v", precision="reference", ffn_tokens=3), want, atol=1e-5)


def test_what_does_not_fit_beside_a_stage_has_left_before_it(tiny_world: TinyWorld, tmp_path: Path) -> None:
    """A limit under which only one model fits at a time: nothing of an earlier stage is there in a later one."""
    with Engine(tiny_world.settings) as engine:
        request = Request(
            model="tiny-t2v-two", prompt="a cat", seed=1, device="cpu", dtype="float32", save=tmp_path / "a.mp4"
        )
        plan = engine.plan(request)
        assert max(len(engine._models) for _ in engine.run(plan)) == 4, "all of them stay where there is room"
        tight = plan.model_copy(
            update={"limits": plan.limits.model_copy(update={"device": 400_000_001}), "seeds": (2,)}
        )
        engine.close()
    with Engine(tiny_world.settings) as engine:
        output = plan.output.model_copy(update={"paths": ((tmp_path / "b.mp4",),)})
        seen = [len(engine._models) for _ in engine.run(tight.model_copy(update={"output": output}))]
        assert max(seen) == 1 or all(ref.stored == ref.dtype for ref in plan.experts.values())


# --- the switch of experts -------------------------------------------------------------------------


class Ways:
    """In which order the blocks of both experts are copied, entered and left, as ("copy", "low 0") and so on."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        self._engine, self._seen = engine, []
        for owner, name, word in ((Unit, "enter", "enter"), (Unit, "leave", "leave")):
            patch.setattr(owner, name, self._noting(getattr(owner, name), word))
        claim = Ring._claim

        def claiming(ring: Ring, unit: Unit, busy: object) -> object:
            if all(slot.unit is not unit for slot in ring._slots):
                self._seen.append(("copy", unit))
            return claim(ring, unit, busy)

        patch.setattr(Ring, "_claim", claiming)

    def _noting(self, original, word: str):
        def noting(unit: Unit, *args: object) -> None:
            self._seen.append((word, unit))
            original(unit, *args)

        return noting

    @property
    def seen(self) -> list[tuple[str, str]]:
        names = {}
        for ref, module in self._engine._models._modules.items():
            if isinstance(runner := getattr(module, "run_blocks", None), BlockStream):
                expert = "high" if "high" in ref.files[0].name else "low"
                names |= {unit: f"{expert} {index}" for index, unit in enumerate(runner.units)}
        return [(word, names[unit]) for word, unit in self._seen if unit in names]


SWITCHED = {
    "both branches": {"guidance": 3.0},
    "one branch": {"guidance": 1.0},
    "lora": {"guidance": 3.0, "lora": "lora.safetensors:0.7"},
    "rounded when loaded": {"guidance": 3.0, "quantise": "int8"},
    "quantised files": {"guidance": 1.0, "dit": "low.safetensors", "dit_high": "high.safetensors"},
}


@pytest.mark.parametrize("case", SWITCHED)
@pytest.mark.parametrize("planted", [False, True])
def test_the_next_expert_comes_through_the_ring_while_the_last_one_computes(
    tiny_world: TinyWorld, latents, tmp_path: Path, case: str, planted: bool
) -> None:
    """The planted fault is not to ask for it: the same bits, but its first block comes when it is wanted."""
    fields = dict(SWITCHED[case])
    if "lora" in fields:
        write_lora(tmp_path / "lora.safetensors", "comfyui", low_rank(SHAPES))
        fields["lora"] = f"{tmp_path}/{fields['lora']}"
    for role, source in (("dit", "t2v"), ("dit_high", "t2v_high")):
        if role in fields:
            fields[role] = tmp_path / str(fields[role])
            write_fp8(fields[role], load_file(tiny_world.file(f"diffusion_models/{source}.safetensors")))
    want = latents("tiny-t2v-two", **fields)
    for swap in (1, 2):
        with Engine(tiny_world.settings) as engine, pytest.MonkeyPatch.context() as patch:
            if planted:
                patch.setattr(Residents, "follow", lambda *_: None)
            ways = Ways(engine, patch)
            got = run(engine, tmp_path, "tiny-t2v-two", blocks_to_swap=swap, **fields)
            seen = ways.seen
        assert torch.equal(got, want)
        first = next(unit for word, unit in seen if word == "copy" and "low" in unit)
        brought = seen.index(("copy", first))
        left = max(index for index, (word, unit) in enumerate(seen) if word == "leave" and "high" in unit)
        assert (brought < left) != planted
        assert seen[brought:].index(("enter", first)) < [*seen[brought + 1 :], ("copy", first)].index(("copy", first))
        assert seen.count(("copy", first)) <= sum(word == "enter" and unit == first for word, unit in seen) + 1


def test_what_is_brought_early_takes_nothing_of_the_device(tiny_world: TinyWorld, tmp_path: Path) -> None:
    """The second expert holds none of its memory until the first one is gone; the device "meta" stands for it."""
    with Engine(tiny_world.settings) as engine:
        plan = engine.plan(request("tiny-t2v-two", tmp_path, blocks_to_swap=2))
    low = plan.experts["low"].model_copy(update={"device": "meta"})
    module = load(low)
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    inside = {id(tensor) for tensor in module.blocks.parameters()}
    settle(module, low)
    assert all(tensor.is_meta == (id(tensor) not in inside) for tensor in module.parameters())


def test_plan_shows_what_was_asked(engine: Engine, tmp_path: Path) -> None:
    from kinema.cli.plans import plan_text

    request = Request(
        model="tiny-t2v", prompt="a cat", device="cpu", ram="8GB", blocks_to_swap=1, tile=64, save=tmp_path / "x.mp4"
    )
    plan = engine.plan(request)
    assert plan.limits.device == 8_000_000_000 and set(plan.limits.given) == {"ram", "blocks_to_swap", "tile"}
    text = plan_text(plan)
    assert "8.0 GB" in text and "1 of 2 blocks" in text and "--blocks-to-swap" in text
