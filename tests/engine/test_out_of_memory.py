"""Memory that runs out, at every stage of every kind of job: that job ends with what would fit, all of it is let go,
and the same engine goes on to the same result: of a new job, and of what was kept of the one that ended."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import kinema.clips.speech
import kinema.delivery
import kinema.residents
from animate_world import animation
from kinema.chain import plan_chain, run_chain
from kinema.engine import Engine
from kinema.errors import MachineError
from kinema.models.clip_text import ClipText
from kinema.models.encoders import UMT5, ClipVision
from kinema.models.flux import FluxDiT
from kinema.models.flux_vae import FluxVAE
from kinema.models.siglip import Redux, Siglip
from kinema.models.wan import WanDiT
from kinema.models.wan_vae import WanVAE
from kinema.runtime.blocks import Unit
from kinema.schema import Request, Result, Settings
from speech_world import inputs as speaking
from tiny_world import TinyWorld, film, picture


@pytest.fixture(scope="module")
def settings(flux_world: TinyWorld, speech_settings: Settings, animate_settings: Settings) -> Settings:
    """Small models of every kind, in one place."""
    every = (flux_world.settings, speech_settings, animate_settings)
    models = dict.fromkeys(path for one in every for path in one.models)
    catalogs = dict.fromkeys(path for one in every for path in one.catalogs)
    return Settings(models=tuple(models), catalogs=tuple(catalogs))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("inputs")
    first, mask = picture(folder / "first.png"), folder / "mask.png"
    Image.new("L", (64, 64), 255).save(mask)
    video = {"output": "mp4,latents", "save_steps": 0.0}
    image = {"output": "png,latents", "save_steps": 0.0}
    return {
        "text": {"model": "tiny-t2v", **video},
        "two experts": {"model": "tiny-i2v-two", "first": first, "steps": 4, **video},
        "streamed": {"model": "tiny-t2v-two", "steps": 4, "blocks_to_swap": 2, **video},
        "clip": {"model": "tiny-clip", "first": first, **video},
        "video": {"model": "tiny-t2v", "video": film(folder / "film.mp4"), **video},
        "vace": {"model": "tiny-vace", "control": film(folder / "control.mp4"), **video},
        "speech": {"model": "tiny-s2v", "clips": 2, **speaking(folder), **video},
        "animate": {"model": "tiny-animate", **animation(folder, 17), **video},
        "flux": {"model": "tiny-flux", **image},
        "flux fill": {"model": "tiny-fill", "first": first, "mask": mask, **image},
        "flux kontext": {"model": "tiny-kontext", "reference": [first], "size": "64x64", **image},
        "flux redux": {"model": "tiny-redux", "reference": [first], **image},
    }


class Fault(NamedTuple):
    """Where memory runs out: in which job, in the how-manieth call of what, and the stage that has to be named."""

    job: str
    owner: Any
    name: str
    call: int
    stage: str


FAULTS = {
    "text encoder": Fault("text", UMT5, "encode", 1, "encode text"),
    "loading the text encoder": Fault("text", kinema.residents, "load", 1, "encode text"),
    "image encoder": Fault("clip", ClipVision, "encode", 1, "encode images"),
    "VAE of an image": Fault("two experts", WanVAE, "encode", 1, "encode images"),
    "VAE of the source video": Fault("video", WanVAE, "encode", 1, "encode images"),
    "VAE of the guide of VACE": Fault("vace", WanVAE, "encode", 2, "encode images"),
    "loading the first expert": Fault("text", WanDiT, "requires_grad_", 1, "load"),
    "context of the first expert": Fault("two experts", WanDiT, "prepare_branches", 1, "sample"),
    "first step": Fault("two experts", WanDiT, "forward", 1, "sample"),
    "context of the second expert": Fault("two experts", WanDiT, "prepare_branches", 2, "sample"),
    "last step": Fault("two experts", WanDiT, "forward", 8, "sample"),
    "bringing a block": Fault("streamed", Unit, "fill", 4, "sample"),
    "loading the second expert": Fault("streamed", kinema.residents, "load", 3, "sample"),
    "VAE decoder": Fault("two experts", WanVAE, "decode_chunks", 1, "decode"),
    "writing the video": Fault("text", kinema.delivery, "write", 1, "decode"),
    "speech encoder": Fault("speech", kinema.clips.speech, "encode_audio", 1, "encode inputs"),
    "reference of speech": Fault("speech", WanVAE, "encode", 1, "encode inputs"),
    "frames before the second clip": Fault("speech", WanVAE, "encode", 2, "encode inputs"),
    "sampling the second clip": Fault("speech", WanDiT, "forward", 6, "sample"),
    "decoding the second clip": Fault("speech", WanVAE, "decode_chunks", 2, "decode"),
    "image encoder of Animate": Fault("animate", ClipVision, "encode", 1, "encode inputs"),
    "pose of the second clip": Fault("animate", WanVAE, "encode", 5, "encode inputs"),
    "sampling the second clip of Animate": Fault("animate", WanDiT, "forward", 3, "sample"),
    "decoding the second clip of Animate": Fault("animate", WanVAE, "decode_chunks", 2, "decode"),
    "T5": Fault("flux", UMT5, "encode", 1, "encode text"),
    "CLIP's text of FLUX": Fault("flux", ClipText, "encode", 1, "encode text"),
    "CLIP's text beside a picture": Fault("flux fill", ClipText, "encode", 1, "encode text"),
    "VAE of a picture": Fault("flux fill", FluxVAE, "encode", 1, "encode images"),
    "VAE of a reference": Fault("flux kontext", FluxVAE, "encode", 1, "encode images"),
    "SigLIP": Fault("flux redux", Siglip, "encode", 1, "encode images"),
    "Redux": Fault("flux redux", Redux, "forward", 1, "encode images"),
    "loading FLUX": Fault("flux", FluxDiT, "requires_grad_", 1, "load"),
    "context of FLUX": Fault("flux", FluxDiT, "prepare_branches", 1, "sample"),
    "step of FLUX": Fault("flux", FluxDiT, "forward", 2, "sample"),
    "decoder of FLUX": Fault("flux", FluxVAE, "decode_chunks", 1, "decode"),
}


def exhausted(*_: object, **__: object) -> None:
    """Ask torch for more than any machine has: its own error, of its own allocator."""
    torch.empty(2**55, dtype=torch.uint8)


class Held:
    """Everything large that is alive when memory runs out: to see that nothing of it is alive afterwards."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen: list[weakref.ref[Any]] = []

    def look(self, arguments: tuple[object, ...]) -> None:
        modules = list(self._engine._models._modules.values())
        tensors = [tensor for module in modules for tensor in module.parameters()]
        given = [argument for argument in arguments if isinstance(argument, Tensor | nn.Module)]
        self._seen += [weakref.ref(thing) for thing in (*modules, *tensors, *given)]

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self._seen)


def failing_at(fault: Fault, held: Held) -> Callable[..., Any]:
    original, calls = getattr(fault.owner, fault.name), 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= fault.call:  # a copy that failed is tried again
            held.look(arguments)
            exhausted()
        return original(*arguments, **named)

    return call


def finish(engine: Engine, job: dict[str, Any], save: Path) -> Tensor:
    plan = engine.plan(request(job, save))
    (result,) = (event for event in engine.run(plan) if isinstance(event, Result))
    return load_file(result.paths[-1])["latents"]


def going_on(engine: Engine, kept: Path, save: Path) -> Tensor:
    """Latents of what was made of saved steps, or of a folder of clips."""
    asked = Request(save=save, output="mp4,latents") if kept.is_dir() else None
    (result,) = (event for event in engine.resume(kept, asked) if isinstance(event, Result))
    return load_file(result.paths[-1])["latents"]


def request(job: dict[str, Any], save: Path) -> Request:
    return Request.model_validate({"prompt": "a cat walks", "seed": 3, "device": "cpu", "save": save, **job})


def suffix(job: dict[str, Any]) -> str:
    return "." + job["output"].split(",")[0]


@pytest.fixture(scope="module")
def engine(settings: Settings) -> Iterator[Engine]:
    """One for all faults: each has to leave it as if nothing had been."""
    with Engine(settings) as engine:
        yield engine


@pytest.mark.parametrize("name", sorted({fault.job for fault in FAULTS.values()}))
def test_memory_that_runs_out_ends_that_job_alone(
    settings: Settings, jobs, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One engine for all faults of a job: each has to leave it as if nothing had been."""
    job = jobs[name]
    with Engine(settings) as engine:
        want = finish(engine, job, tmp_path / f"want{suffix(job)}")
        for number, (place, fault) in enumerate(FAULTS.items()):
            if fault.job != name:
                continue
            engine.release()
            plan, held = engine.plan(request(job, tmp_path / f"{number}{suffix(job)}")), Held(engine)
            with monkeypatch.context() as patch, pytest.raises(MachineError) as caught:
                patch.setattr(fault.owner, fault.name, failing_at(fault, held))
                list(engine.run(plan))
            error = caught.value
            assert error.details["stage"] == fault.stage and f"in the stage {fault.stage}: " in error.message, place
            assert error.hint and "allocate" in error.message
            assert len(engine._models) == 0 and len(engine._texts) == 0 and held.alive == 0, place
            kept = [error.details[kind] for kind in ("steps", "latents", "clips") if kind in error.details]
            assert all(Path(path).exists() and str(path) in error.hint for path in kept)
            later = fault.call > 1 and fault.stage not in ("encode images", "load")
            assert bool(kept) == (later or fault.stage == "decode"), place
            if fault.stage == "decode":
                with monkeypatch.context() as patch, pytest.raises(MachineError, match="in the stage decode: "):
                    patch.setattr(fault.owner, fault.name, failing_at(fault, held))
                    list(engine.decode(Path(kept[0]), Request(save=tmp_path / f"alone{number}{suffix(job)}")))
                assert held.alive == 0 and Path(kept[0]).exists(), place
            elif kept:
                assert torch.equal(going_on(engine, Path(kept[0]), tmp_path / f"on{number}{suffix(job)}"), want), place
        assert torch.equal(finish(engine, job, tmp_path / f"again{suffix(job)}"), want)


def test_a_tensor_that_is_still_held_would_show(engine: Engine, jobs, tmp_path: Path) -> None:
    """The planted fault: somebody keeps what the run held."""
    held, stolen = Held(engine), []
    finish(engine, jobs["text"], tmp_path / "x.mp4")
    held.look(())
    stolen.append(next(iter(engine._models._modules.values())))
    engine.release()
    assert held.alive > 0
    stolen.clear()
    assert held.alive == 0


@pytest.mark.parametrize(
    ("owner", "name", "stage"), [(FluxDiT, "forward", "sample"), (WanVAE, "encode", "encode images")]
)
def test_a_chain_ends_at_the_job_that_does_not_fit(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, stage: str
) -> None:
    """Of picture and video, whichever it is; the picture that is done stays, and the chain can be run again."""
    asked = Request(prompt="a cat", model="tiny-flux", seed=3, device="cpu", save=tmp_path / "a.png", overwrite=True)
    chain = plan_chain(engine, asked, {"model": "tiny-clip", "frames": 5})
    held = Held(engine)
    with monkeypatch.context() as patch, pytest.raises(MachineError) as caught:
        patch.setattr(owner, name, failing_at(Fault("", owner, name, 1, stage), held))
        list(run_chain(engine, chain))
    assert caught.value.details["stage"] == stage and len(engine._models) == 0 and held.alive == 0
    assert (tmp_path / "a.png").exists() == (owner is WanVAE)
    assert sum(isinstance(event, Result) for event in run_chain(engine, chain)) == 2
