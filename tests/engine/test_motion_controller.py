"""The motion controller against its formula, in the DiT, from its file, and from a request to a video."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from checkpoints import TINY, official_state, tiny, write, write_sparse
from kinema.engine import Engine
from kinema.errors import CatalogError, CheckpointError, RequestError
from kinema.media.probe import probe
from kinema.schema import Plan, Request, Result
from kinema.tensors import Conditions
from kinema.weights.detect import inspect
from plan.world import file, files_of, plan
from tiny_world import DIT

DIM, FREQ_DIM = TINY["motion_controller"]["dim"], TINY["motion_controller"]["freq_dim"]


def ask(tmp_path: Path, **fields: object) -> Request:
    defaults = {"model": "tiny-t2v", "prompt": "a cat walks", "seed": 3, "save": tmp_path / "out.mp4", "device": "cpu"}
    return Request(**{**defaults, "precision": "reference", "overwrite": True, "steps": 1, **fields})


def finish(engine: Engine, request: Request) -> Result:
    (result,) = (event for event in engine.run(engine.plan(request)) if isinstance(event, Result))
    return result


def by_hand(weights: dict[str, torch.Tensor], bucket_id: int) -> np.ndarray:
    """The formula in float64: cosines and sines of ten times the bucket, three layers, SiLU between them."""
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}
    angles = 10 * bucket_id * 10000.0 ** (-np.arange(FREQ_DIM // 2) / (FREQ_DIM // 2))
    x = np.concatenate([np.cos(angles), np.sin(angles)])
    for layer in (0, 2, 4):
        x = w[f"linear.{layer}.weight"] @ x + w[f"linear.{layer}.bias"]
        x = x / (1 + np.exp(-x)) if layer < 4 else x
    return x.reshape(1, 6, DIM)


@pytest.mark.parametrize("bucket_id", [0, 1, 50, 100])
def test_rows_are_those_of_the_formula(bucket_id: int) -> None:
    rows = tiny("motion_controller")(bucket_id)
    assert rows.shape == (1, 6, DIM) and rows.dtype == torch.float32
    want = by_hand(official_state("motion_controller"), bucket_id)
    assert np.abs(rows.numpy() - want).max() < 1e-5 * np.abs(want).max()
    off_by_one = by_hand(official_state("motion_controller"), bucket_id + 1)
    assert np.abs(rows.numpy() - off_by_one).max() > 1e-2 * np.abs(want).max()


@torch.no_grad()
def test_rows_are_added_to_the_modulation_of_blocks_and_of_nothing_else() -> None:
    """As a bias of the time projection would be, which modulates the blocks, not the head."""
    model, biased = tiny("dit", DIT), tiny("dit", DIT)
    rows = tiny("motion_controller")(70)
    biased.time_projection[1].bias += rows.flatten()
    conditions = Conditions((torch.randn(5, DIT["text_dim"], generator=torch.Generator().manual_seed(0)),))
    x, timesteps = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([700.0])

    def velocity(dit: torch.nn.Module, motion: torch.Tensor | None) -> torch.Tensor:
        return dit(x, timesteps, dit.prepare(replace(conditions, motion_B6D=motion)))

    found = velocity(model, rows)
    assert torch.allclose(found, velocity(biased, None), atol=1e-5)
    assert not torch.allclose(found, velocity(model, None), atol=1e-3)


def test_the_published_file_is_recognised_by_its_tensors(tmp_path: Path) -> None:
    shapes = {"linear.0": (1536, 256), "linear.2": (1536, 1536), "linear.4": (9216, 1536)}
    tensors = {f"{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    facts = inspect(write_sparse(tmp_path / "model.safetensors", tensors))
    assert (facts.component, facts.config) == ("motion_controller", {"freq_dim": 256, "dim": 1536})
    assert facts.structure == "motion controller of a DiT 1536 wide"
    with pytest.raises(CheckpointError, match=r"linear\.4\.weight is \[9215, 1536\]"):
        inspect(write_sparse(tmp_path / "cut.safetensors", tensors | {"linear.4.weight": (9215, 1536)}))
    with pytest.raises(CheckpointError, match=r"linear\.6\.weight"):
        inspect(write_sparse(tmp_path / "more.safetensors", tensors | {"linear.6.weight": (1, 9216)}))


def test_a_request_makes_a_video_and_its_bucket_counts(engine: Engine, tmp_path: Path) -> None:
    result = finish(engine, ask(tmp_path, motion_bucket_id=80))
    assert probe(result.paths[0]).frames == 5
    assert result.plan.motion and result.plan.motion.bucket_id == 80
    controller = result.plan.motion.controller.files[0]
    assert controller.name == "tiny.safetensors" and str(controller) in result.plan.hashes
    assert Plan.model_validate_json(result.plan.model_dump_json()) == result.plan

    def latents(bucket_id: int | None) -> torch.Tensor:
        request = ask(tmp_path, motion_bucket_id=bucket_id, save=tmp_path / "x.latents.safetensors")
        return load_file(finish(engine, request).paths[0])["latents"]

    slow, fast, none = latents(0), latents(100), latents(None)
    assert not torch.equal(slow, fast) and not torch.equal(slow, none), "bucket 0 is slow, not none at all"
    assert torch.equal(slow, latents(0))


def test_what_cannot_be_is_refused_before_anything_is_loaded(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="tiny-vace has no motion controller: --motion-bucket-id 0"):
        engine.plan(ask(tmp_path, model="tiny-vace", motion_bucket_id=0))
    with pytest.raises(RequestError, match="is not told how much is to move"):
        engine.plan(ask(tmp_path, motion_controller=engine.settings.models[0] / "speed/tiny.safetensors"))
    wide = write(tmp_path / "wide.safetensors", official_state("motion_controller", {"freq_dim": 32, "dim": 64}))
    with pytest.raises(CheckpointError, match="moves a DiT 64 wide"):
        engine.plan(ask(tmp_path, motion_bucket_id=5, motion_controller=wide))
    with pytest.raises(RequestError, match=r"--motion-controller .*t2v.safetensors is a dit"):
        dit = engine.settings.models[0] / "diffusion_models/t2v.safetensors"
        engine.plan(ask(tmp_path, motion_bucket_id=5, motion_controller=dit))


def test_one_that_is_not_there_is_named_with_what_brings_it(engine: Engine, tmp_path: Path) -> None:
    root = engine.settings.models[0]
    parts = {"dit": root / "diffusion_models/t2v.safetensors", "vae": root / "vae/tiny_vae.safetensors"}
    parts["text_encoder"] = root / "text_encoders/tiny_umt5.safetensors"
    with pytest.raises(CatalogError) as caught:
        engine.plan(ask(tmp_path, model="wan2.1-t2v-1.3b", motion_bucket_id=5, **parts))
    assert caught.value.details["missing"] == ["motion_controller"]
    assert "kinema models pull ms:DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1" in caught.value.hint


def test_the_published_model_takes_it_and_others_do_not() -> None:
    facts = {"files": {**files_of_t2v(), "motion_controller": CONTROLLER}}
    made = plan("wan2.1-t2v-1.3b", facts=facts, motion_bucket_id=100)
    assert made.motion and made.motion.controller.dtype == "float32"
    for model in ("wan2.1-t2v-14b", "wan2.2-t2v-a14b", "wan2.1-fun-inp-1.3b"):
        with pytest.raises(RequestError, match="has no motion controller"):
            plan(model, motion_bucket_id=100)


CONTROLLER = file("model", "motion_controller", {"freq_dim": 256, "dim": 1536}, 34_000_000)


def files_of_t2v() -> dict[str, object]:
    from plan.world import CATALOG

    return files_of(CATALOG["wan2.1-t2v-1.3b"])
