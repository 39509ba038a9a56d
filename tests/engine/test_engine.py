"""The engine on real files of small models: every kind of model, its events and outputs, and how it fails."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import kinema
from kinema import ops
from kinema.engine import Engine
from kinema.errors import Cancelled, CheckpointError, KinemaError, NumericsError, OutputError, RequestError
from kinema.media.metadata import read_metadata
from kinema.media.probe import probe
from kinema.media.reader import read_video
from kinema.progress import Meter, Stages
from kinema.schema import Plan, Preview, Progress, Request, Result
from kinema.texts import KEPT
from tiny_world import TinyWorld, picture

MODELS = {
    "tiny-t2v": (),
    "tiny-t2v-two": (),
    "tiny-i2v-two": ("first", "last"),
    "tiny-clip": ("first",),
    "tiny-flf": ("first", "last"),
    "tiny-ti2v": ("first",),
}


@pytest.fixture
def ask(tmp_path: Path):
    def request(model: str, **fields: object) -> Request:
        media = {role: picture(tmp_path / f"{role}.png", seed=i) for i, role in enumerate(MODELS[model])}
        defaults = {
            "prompt": "a cat walks",
            "seed": 3,
            "save": tmp_path / "out.mp4",
            "precision": "reference",
            "device": "cpu",
        }
        return Request(**{**defaults, "model": model, **media, **fields})

    return request


def finish(engine: Engine, request: Request) -> Result:
    (result,) = (event for event in engine.run(engine.plan(request)) if isinstance(event, Result))
    return result


@pytest.mark.parametrize("model", MODELS)
def test_every_kind_of_model_makes_a_video(engine: Engine, ask, model: str) -> None:
    result = finish(engine, ask(model))
    (path,) = result.paths
    facts = probe(path)
    assert (facts.width, facts.height) == (result.plan.width, result.plan.height) == (32, 32)
    assert facts.frames == 5
    carried = Plan.model_validate_json(read_metadata(path)["kinema"])
    assert carried == Plan.model_validate_json(path.with_suffix(".json").read_text("utf-8"))
    assert carried.seeds == (3,) and set(carried.versions) >= {"kinema", "torch"}
    assert set(carried.hashes) == {str(file) for file in carried.files}
    assert set(carried.files) >= {image.path for image in carried.images}
    assert not list(path.parent.glob("*.partial")) and not list(path.parent.glob("*.latents.safetensors"))


def test_events_tell_every_stage_in_order_and_its_time(engine: Engine, ask) -> None:
    events = list(engine.run(engine.plan(ask("tiny-i2v-two", steps=3))))
    stages = [stage for stage, _ in itertools.groupby(e.stage for e in events if isinstance(e, Progress))]
    assert [s for s in stages if s != "load"] == ["encode text", "encode images", "sample", "decode"]
    sampled = [e for e in events if isinstance(e, Progress) and e.stage == "sample"]
    assert [e.done for e in sampled] == [0, 1, 2, 3] and sampled[-1].eta_seconds == 0
    result = events[-1]
    assert isinstance(result, Result)
    assert all(report.seconds > 0 and report.peak_bytes > 0 for report in result.stages)


def test_same_request_same_latents_on_a_fresh_engine(
    tiny_world: TinyWorld, engine: Engine, ask, tmp_path: Path
) -> None:
    save = tmp_path / "a.latents.safetensors"
    finish(engine, ask("tiny-t2v", save=save))
    with Engine(tiny_world.settings) as fresh:
        finish(fresh, ask("tiny-t2v", save=tmp_path / "b.latents.safetensors"))
    assert torch.equal(load_file(save)["latents"], load_file(tmp_path / "b.latents.safetensors")["latents"])
    finish(engine, ask("tiny-t2v", save=tmp_path / "c.latents.safetensors", seed=4))
    assert not torch.equal(load_file(save)["latents"], load_file(tmp_path / "c.latents.safetensors")["latents"])


def test_latents_alone_then_decoded_equal_the_video_made_at_once(engine: Engine, ask, tmp_path: Path) -> None:
    at_once = finish(engine, ask("tiny-t2v", save=tmp_path / "once-frames", output="png"))
    latents = finish(engine, ask("tiny-t2v", save=tmp_path / "x.latents.safetensors")).paths[0]
    (later,) = (
        e for e in engine.decode(latents, Request(save=tmp_path / "later", output="png")) if isinstance(e, Result)
    )
    for first, second in zip(sorted(at_once.paths[0].iterdir()), sorted(later.paths[0].iterdir()), strict=True):
        assert torch.equal(torch.cat(list(read_video(first))), torch.cat(list(read_video(second))))
    assert latents.exists()


def test_several_seeds_and_kinds(engine: Engine, ask, tmp_path: Path) -> None:
    results = [
        e
        for e in engine.run(engine.plan(ask("tiny-t2v", count=2, save=tmp_path / "many", output="mp4,latents,gif")))
        if isinstance(e, Result)
    ]
    assert [r.seed for r in results] == [3, 4]
    names = sorted(p.name for p in (tmp_path / "many").iterdir())
    assert sorted(Path(n).suffix for n in names) == sorted([".gif", ".json", ".safetensors", ".mp4"] * 2)
    assert all(path.exists() for r in results for path in r.paths)
    latents = next(path for path in results[0].paths if path.suffix == ".safetensors")
    (late,) = (e for e in engine.decode(latents, Request(save=tmp_path / "late.webp")) if isinstance(e, Result))
    assert late.paths == (tmp_path / "late.webp",), "the file that was named, and no other kind of the first run"


def test_strip_leaves_no_plan_anywhere(engine: Engine, ask, tmp_path: Path) -> None:
    (path,) = finish(engine, ask("tiny-t2v", strip=True)).paths
    assert "kinema" not in read_metadata(path) and not path.with_suffix(".json").exists()


def test_preview_is_a_picture_of_the_right_size_each_step(engine: Engine, ask, tmp_path: Path) -> None:
    preview = tmp_path / "preview.png"
    events = list(engine.run(engine.plan(ask("tiny-t2v", preview=preview, steps=3))))
    assert [e.step for e in events if isinstance(e, Preview)] == [1, 2, 3]
    assert probe(preview).width == 32 or torch.cat(list(read_video(preview))).shape[1:3] == (32, 32)


def test_long_prompt_is_cut_and_the_plan_says_so_before_anything_loads(engine: Engine, ask) -> None:
    plan = engine.plan(ask("tiny-t2v", prompt="a cat walks on grass " * 20))
    (note,) = (note for note in plan.notes if note.about == "prompt")
    assert "left out" in note.text and note in list(engine.run(plan))


def test_encoded_texts_do_not_pile_up(engine: Engine, ask, tmp_path: Path) -> None:
    plan = engine.plan(ask("tiny-t2v"))
    for number in range(KEPT + 5):
        engine._texts.encode(plan, [f"cat {number}", plan.negative], engine._models.get)
    assert len(engine._texts) == KEPT
    assert engine._texts.has(plan, [plan.negative, f"cat {KEPT}"]) and not engine._texts.has(plan, ["cat 0"])


def test_a_folder_named_like_the_file_is_refused_before_anything_loads(engine: Engine, ask, tmp_path: Path) -> None:
    (tmp_path / "x.mp4").mkdir()
    with pytest.raises(RequestError, match="is a folder"):
        engine.plan(ask("tiny-t2v", save=tmp_path / "x.mp4", overwrite=True))


@pytest.mark.parametrize(("first", "each"), [(9.0, 1.0), (0.1, 2.0)])
def test_time_left_is_within_a_fifth_after_the_second_step(first: float, each: float) -> None:
    times = iter([0.0, first, *(first + each * step for step in range(1, 20))])
    meter = Meter("sample", 20, clock=lambda: next(times))
    ticks = [meter.tick() for _ in range(20)]
    for done, tick in enumerate(ticks[1:], 2):
        assert tick.eta_seconds == pytest.approx(each * (20 - done), rel=0.2)
    assert ticks[0].eta_seconds == pytest.approx(first * 19)


def test_time_left_knows_that_steps_without_guidance_are_half_the_work() -> None:
    seconds = [5.0] + [2.0] * 3 + [1.0] * 4
    times = itertools.accumulate([0.0, *seconds])
    meter = Meter("sample", 8, work=[2] * 4 + [1] * 4, clock=lambda: next(times))
    ticks = [meter.tick() for _ in seconds]
    for done, tick in enumerate(ticks[1:], 2):
        assert tick.eta_seconds == pytest.approx(sum(seconds[done:]))


# --- failing --------------------------------------------------------------------------------------


@pytest.fixture
def broken_world(tiny_world: TinyWorld, tmp_path: Path):
    """A copy of the files of tiny-t2v in which one tensor is spoilt."""

    def spoil(file: str, tensor: str, value: float) -> Request:
        state = load_file(tiny_world.file(file))
        state[tensor] = torch.full_like(state[tensor], value)
        save_file(state, tmp_path / "spoilt.safetensors")
        field = {"diffusion_models": "dit", "vae": "vae", "text_encoders": "text_encoder"}[file.split("/")[0]]
        return Request(
            model="tiny-t2v", prompt="a cat", seed=1, save=tmp_path / "out.mp4", precision="reference", device="cpu",
            **{field: tmp_path / "spoilt.safetensors"},
        )  # fmt: skip

    return spoil


def test_nan_in_a_layer_stops_at_its_step_and_names_the_layer(engine: Engine, broken_world, tmp_path: Path) -> None:
    request = broken_world("diffusion_models/t2v.safetensors", "blocks.1.ffn.2.bias", float("nan"))
    with pytest.raises(NumericsError, match=r"step 1 of 2.*blocks\.1\.ffn\.2"):
        finish(engine, request)
    assert not list(tmp_path.glob("out*"))


def test_black_video_is_never_delivered_but_its_latents_are_kept(engine: Engine, broken_world, tmp_path: Path) -> None:
    state_key = "decoder.head.2.weight"
    request = broken_world("vae/tiny_vae.safetensors", state_key, 0.0)
    plan = engine.plan(request)
    state = load_file(tmp_path / "spoilt.safetensors")
    state["decoder.head.2.bias"] = torch.full_like(state["decoder.head.2.bias"], -1.0)
    save_file(state, tmp_path / "spoilt.safetensors")
    with pytest.raises(NumericsError, match="every pixel of the video has the same value") as caught:
        list(engine.run(plan))
    kept = Path(caught.value.details["latents"])
    assert kept.exists() and f"kinema decode {kept}" in caught.value.hint
    assert not (tmp_path / "out.mp4").exists()


def test_dead_text_encoder_is_refused(engine: Engine, broken_world) -> None:
    request = broken_world("text_encoders/tiny_umt5.safetensors", "token_embedding.weight", 0.0)
    with pytest.raises(CheckpointError):
        finish(engine, request)


def test_failed_writing_keeps_the_latents_and_the_command_finishes_the_job(engine: Engine, ask, tmp_path: Path) -> None:
    plan = engine.plan(ask("tiny-t2v", save=tmp_path / "gone" / "out.mp4"))
    (tmp_path / "gone").write_text("a file where the folder should be")
    with pytest.raises(OutputError) as caught:
        list(engine.run(plan))
    kept = Path(caught.value.details["latents"])
    assert kept.exists()
    (result,) = (e for e in engine.decode(kept, Request(save=tmp_path / "rescued.mp4")) if isinstance(e, Result))
    assert probe(result.paths[0]).frames == 5
    kept.unlink()


def test_latents_that_lie_beside_the_output_are_left_alone(engine: Engine, ask, tmp_path: Path) -> None:
    work = finish(engine, ask("tiny-t2v", save=tmp_path / "cat.latents.safetensors")).paths[0]
    before = work.read_bytes()
    finish(engine, ask("tiny-t2v", save=tmp_path / "cat.mp4", seed=9))
    assert work.read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob("*.latents.safetensors")) == [work.name]


def test_attention_of_the_plan_is_the_models(engine: Engine, ask) -> None:
    plan = engine.plan(ask("tiny-t2v"))
    wrong = plan.experts["model"].model_copy(update={"attention": "nonsense"})
    with pytest.raises(KinemaError, match="nonsense"):
        list(engine.run(plan.model_copy(update={"experts": {"model": wrong}})))


def test_a_stage_counts_once_for_each_time_it_ran() -> None:
    stages = Stages("cpu")
    for stage in ("sample", "decode", "sample", "decode", "encode text"):
        with stages.measure(stage):
            pass
    total = {report.stage: report.seconds for report in stages.reports}
    assert stages.mean_seconds()["sample"] == pytest.approx(total["sample"] / 2)
    assert stages.mean_seconds()["encode text"] == total["encode text"]


def test_cancel_stops_within_a_step_and_leaves_nothing(engine: Engine, ask, tmp_path: Path) -> None:
    for after in range(1, 5):
        asked = itertools.count(1)
        save = tmp_path / f"cancel{after}.mp4"
        events = []
        with pytest.raises(Cancelled):
            plan = engine.plan(ask("tiny-t2v", steps=4, save=save))
            for event in engine.run(plan, lambda after=after, asked=asked: next(asked) >= after):
                events.append(event)
        assert sum(isinstance(e, Progress) and e.stage == "sample" and e.done > 0 for e in events) <= after
        assert not save.exists() and not list(tmp_path.glob(".*partial"))


def test_closing_the_generator_in_any_place_leaves_no_half_file(engine: Engine, ask, tmp_path: Path) -> None:
    total = len(list(engine.run(engine.plan(ask("tiny-t2v", save=tmp_path / "whole.mp4")))))
    for stop in range(1, total):
        save = tmp_path / f"closed{stop}.mp4"
        running = engine.run(engine.plan(ask("tiny-t2v", save=save)))
        list(itertools.islice(running, stop))
        running.close()
        assert not save.exists() and not list(tmp_path.glob(".*.partial")), f"after {stop} events"


def test_latents_file_of_another_program_is_refused(engine: Engine, tmp_path: Path) -> None:
    save_file({"latents": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="holds no latents of Kinema"):
        list(engine.decode(tmp_path / "foreign.safetensors"))
    save_file({"latents": torch.zeros(1)}, tmp_path / "newer.safetensors", metadata={"kinema": '{"from": "2030"}'})
    with pytest.raises(CheckpointError, match=r"newer\.safetensors holds a plan that this version cannot read"):
        list(engine.decode(tmp_path / "newer.safetensors"))


def test_public_functions(tiny_world: TinyWorld, tmp_path: Path) -> None:
    fields = {
        "model": "tiny-t2v",
        "prompt": "a cat",
        "seed": 1,
        "save": tmp_path / "x.mp4",
        "settings": tiny_world.settings,
    }
    assert kinema.plan(**fields).seeds == (1,)
    result = kinema.generate(**fields)
    assert (
        result.paths == (tmp_path / "x.mp4",) and json.loads((tmp_path / "x.json").read_text())["model"] == "tiny-t2v"
    )


def test_encoded_texts_and_models_are_reused(engine: Engine, ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run with the same texts must not touch the text encoder at all."""
    finish(engine, ask("tiny-t2v"))
    loads = []
    original = engine._models.get
    monkeypatch.setattr(engine._models, "get", lambda ref, *room: loads.append(ref.component) or original(ref, *room))
    finish(engine, ask("tiny-t2v", save=ask("tiny-t2v").save.with_name("again.mp4")))
    assert "text_encoder" not in loads and "dit" in loads


def test_velocity_prepares_each_context_once(
    tiny_world: TinyWorld, engine: Engine, ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kinema.models.wan import WanDiT

    prepared = []
    original = WanDiT.prepare_branches
    monkeypatch.setattr(WanDiT, "prepare_branches", lambda self, c: prepared.append(len(c)) or original(self, c))
    finish(engine, ask("tiny-t2v-two", steps=6))
    assert prepared == [2, 2], "two experts, both branches at once"
    assert ops.PLAN_KEY == "kinema"
