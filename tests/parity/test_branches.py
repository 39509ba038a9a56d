"""What guidance branches are told alike is prepared and held once, with the bits of branches prepared alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from golden_weights import fill, input_tensor
from kinema import ops
from kinema.models import wan
from kinema.models.adapters import animate, camera, reference, speech, vace
from kinema.models.wan import WanConfig, WanDiT
from kinema.models.wan_config import AnimateConfig
from kinema.runtime.blocks import BlockStream, Ring
from kinema.schema import PlanStep
from kinema.tensors import AnimateConditions, Conditions, on_device
from parity import test_wan_adapters, test_wan_speech

Told = tuple[WanDiT, Tensor, Tensor, list[Conditions]]
MODULES = (wan, animate, camera, reference, speech, vace)


def of_adapters(name: str) -> Told:
    """The negative branch differs in its text alone."""
    model, x, timesteps, conditions, _ = test_wan_adapters.load(name)
    negative = replace(conditions, text=(conditions.text[0][:3] / 2,))
    return model, x, timesteps, [conditions, negative]


def of_speech() -> Told:
    """The negative branch hears nothing."""
    model, x, timesteps, conditions, _ = test_wan_speech.load("dit_s2v")
    given = conditions.speech
    assert given is not None
    silent = replace(given, audio_BLDT=torch.zeros_like(given.audio_BLDT))
    return model, x, timesteps, [conditions, replace(conditions, text=(conditions.text[0][:3] / 2,), speech=silent)]


def of_animate() -> Told:
    """The negative branch sees no face. One frame stands for all, for speed."""
    config = WanConfig(256, 64, 5, 36, 16, text_dim=40, text_len=24, has_clip_tokens=True, animate=AnimateConfig())
    model = WanDiT(config).eval()
    fill(model, 3)
    for parameter in model.motion_encoder.parameters():
        if parameter.ndim == 4:  # filled as they are, they tell no face from another
            parameter.mul_(30)

    def tensor(key: str, *shape: int) -> Tensor:
        return input_tensor(key, shape, 3)

    pose, clip, channels = tensor("p", 1, 16, 2, 4, 4), tensor("c", 1, 257, 1280), tensor("y", 1, 20, 3, 4, 4)
    faces = tensor("face", 1, 3, 1, 512, 512), torch.full((1, 3, 1, 512, 512), -1.0)
    told = [
        Conditions((tensor(f"text{rows}", rows, 40),), clip, channels, animate=AnimateConditions(pose, face))
        for rows, face in zip((7, 3), faces, strict=True)
    ]
    return model, tensor("x", 1, 16, 3, 4, 4), torch.tensor([700.0]), told


BRANCHES: dict[str, Callable[[], Told]] = {
    **{name: lambda name=name: of_adapters(name) for name in test_wan_adapters.GOLDENS},
    "speech": of_speech,
    "animate": of_animate,
}


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a context, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(tuple(value.values()))
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))


def shared(contexts: Sequence[Any]) -> int:
    """Return how many tensors both contexts hold as one object, beside the channels both were given."""
    first, second = ({id(t) for t in tensors(replace(context, concat_BCFhw=None))} for context in contexts)
    return len(first & second)


def differences(told: Told) -> int:
    """Return how many tensors prepared together have not the bits of those prepared alone."""
    model, x, timesteps, branches = told
    together, alone = model.prepare_branches(branches), [model.prepare(one) for one in branches]
    velocities = model(x, timesteps, *together), model(x, timesteps, *alone)
    pairs = list(zip(tensors(tuple(together)), tensors(tuple(alone)), strict=True))
    return sum(not torch.equal(ours, theirs) for ours, theirs in (*pairs, velocities))


@pytest.mark.parametrize("name", BRANCHES)
@torch.inference_mode()
def test_prepared_together_is_prepared_alone(name: str) -> None:
    told = BRANCHES[name]()
    assert differences(told) == 0
    model, x, timesteps, branches = told
    contexts = model.prepare_branches(branches)
    model(x, timesteps, *contexts)
    clips = 1 + 2 * len(model.blocks) if model.config.has_clip_tokens else 0  # rows, and keys and values of each block
    # tokens of VACE; pose of Animate; of S2V pose, extra tokens, their positions, and two rows of t = 0
    kept = {"dit_vace": 1, "animate": 1, "speech": 5}.get(name, 1)
    assert shared(contexts) == clips + kept


@pytest.mark.parametrize("name", ["speech", "animate"])
@torch.inference_mode()
def test_sharing_what_differs_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: all branches get what the first one has."""
    told = BRANCHES[name]()
    for module in (speech, animate):
        monkeypatch.setattr(module, "map_once", lambda make, *given: [make(*(g[0] for g in given))] * len(given[0]))
    assert differences(told) > 0


@pytest.mark.parametrize("name", BRANCHES)
@torch.inference_mode()
def test_sharing_nothing_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: all branches get what they have by themselves."""
    told = BRANCHES[name]()
    for module in MODULES:
        monkeypatch.setattr(module, "map_once", lambda make, *given: list(map(make, *given)))
    assert shared(told[0].prepare_branches(told[3])) <= (2 if name == "speech" else 0)


@pytest.mark.parametrize("name", ["dit_vace", "speech", "animate"])
@torch.inference_mode()
def test_blocks_are_visited_as_often_as_for_one_branch_and_may_be_streamed(name: str) -> None:
    told = BRANCHES[name]()
    model, x, timesteps, branches = told
    visits: list[Counter[nn.Module]] = []
    for count in (1, 2):
        visits.append(Counter())
        runs = model.run_blocks

        def counting(blocks, step, state, /, seen=visits[-1], runs=runs):
            blocks = list(blocks)
            seen.update(blocks)
            return runs(blocks, step, state)

        model.run_blocks = counting
        model(x, timesteps, *model.prepare_branches(branches[:count]))
        model.run_blocks = runs
    assert visits[0] == visits[1] and visits[0]
    ring = Ring("cpu")
    model.run_blocks = BlockStream(model.block_groups(), ring)
    assert differences(told) == 0
    ring.close()


def test_what_is_one_object_is_one_on_another_device() -> None:
    _, _, _, (told, negative) = of_adapters("dit_vace")
    there, negative_there = on_device((told, negative), "meta")
    assert there.vace is negative_there.vace and there.vace is not None and there.vace.context_BCFhw.is_meta
    assert there.text[0].shape != negative_there.text[0].shape


@torch.inference_mode()
def test_a_branch_that_joins_shares_too() -> None:
    """Guidance of 1 asks for one branch; where another step asks for both, they are prepared together."""
    model, x, _, (told, negative) = of_adapters("dit_vace")
    velocity = ops.Velocity(lambda _: model, {"cond": told, "uncond": negative}, torch.device("cpu"))
    step = PlanStep(expert="model", sigma=0.7, timestep=700.0, guidance=1.0)
    (alone,) = velocity(step, ("cond",), x)
    again, _ = velocity(step, ("cond", "uncond"), x)
    assert velocity.last is not None and shared(velocity.last.contexts) == 1
    assert torch.equal(alone, again)
