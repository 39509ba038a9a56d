"""Memory that is planned, then kept: streamed runs give the bits of resident ones, and overrides do what they say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kinema.engine import Engine
from kinema.runtime.blocks import BlockStream
from kinema.schema import Request, Result
from tiny_world import TinyWorld, picture

MODELS = {"tiny-t2v": (), "tiny-t2v-two": (), "tiny-i2v-two": ("first",), "tiny-clip": ("first",), "tiny-ti2v": ()}


@pytest.fixture(scope="module")
def engine(tiny_world: TinyWorld) -> Iterator[Engine]:
    with Engine(tiny_world.settings) as engine:
        yield engine


@pytest.fixture
def latents(engine: Engine, tmp_path: Path):
    """Latents of a request; media of the model are made up."""

    def run(model: str, name: str = "x", **fields: object) -> torch.Tensor:
        media = {role: picture(tmp_path / f"{role}.png") for role in MODELS[model]}
        save = tmp_path / f"{name}.latents.safetensors"
        request = Request(
            model=model, prompt="a cat walks", seed=3, device="cpu", save=save, overwrite=True, **media, **fields
        )
        assert any(isinstance(event, Result) for event in engine.run(engine.plan(request)))
        return load_file(save)["latents"]

    return run


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


def test_plan_shows_what_was_asked(engine: Engine, tmp_path: Path) -> None:
    from kinema.cli.plans import plan_text

    request = Request(
        model="tiny-t2v", prompt="a cat", device="cpu", ram="8GB", blocks_to_swap=1, tile=64, save=tmp_path / "x.mp4"
    )
    plan = engine.plan(request)
    assert plan.limits.device == 8_000_000_000 and set(plan.limits.given) == {"ram", "blocks_to_swap", "tile"}
    text = plan_text(plan)
    assert "8.0 GB" in text and "1 of 2 blocks" in text and "--blocks-to-swap" in text
