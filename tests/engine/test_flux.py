"""FLUX.1 at toy size from request to picture: every model, every input, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints import write
from kinema.engine import Engine
from kinema.errors import CatalogError, CheckpointError, KinemaError, RequestError
from kinema.schema import Plan, Request, Result, Settings
from kinema.weights.keys_flux import PARTS
from tiny_flux import autoencoder, clip_text, transformer, transformers_t5
from tiny_world import TinyWorld, picture


@pytest.fixture(scope="module")
def settings(flux_world: TinyWorld) -> Settings:
    return flux_world.settings


def run(engine: Engine, save: Path, **fields: object) -> tuple[Plan, np.ndarray]:
    request = Request.model_validate(
        {"prompt": "a red cat", "seed": 3, "precision": "reference", "save": save, **fields}
    )
    plan = engine.plan(request)
    (result,) = [event for event in engine.run(plan) if isinstance(event, Result)]
    return plan, np.array(Image.open(result.paths[0]).convert("RGB")).astype(int)


def test_a_picture_of_a_text(engine: Engine, tmp_path: Path) -> None:
    plan, pixels = run(engine, tmp_path / "a.png", model="tiny-flux")
    assert (plan.task, plan.frames, plan.latent, plan.tokens) == ("text to image", 1, (16, 1, 8, 8), 16)
    assert plan.flux is not None and plan.flux.guidance == 3.5
    assert [step.timestep for step in plan.steps] == [1000 * step.sigma for step in plan.steps]
    assert pixels.shape == (64, 64, 3) and pixels.std() > 5
    names = {path.name for path in plan.files}
    assert {"flux_dev.safetensors", "tiny_ae.safetensors", "tiny_t5.safetensors", "tiny_clip_l.safetensors"} <= names
    assert {"spiece.model", "vocab.json"} <= names


def test_every_word_and_number_counts(engine: Engine, tmp_path: Path) -> None:
    """Prompt, guidance, true guidance, seed and solver each change the picture; the same request does not."""
    _, first = run(engine, tmp_path / "a.png", model="tiny-flux")
    _, again = run(engine, tmp_path / "b.png", model="tiny-flux")
    assert np.array_equal(first, again)
    changed = [
        {"prompt": "two small squares"},
        {"guidance": 9.0},
        {"true_guidance": 3.0, "negative": "two small squares"},
        {"seed": 4},
        {"solver": "dpmpp", "steps": 3},
        {"shift": 5.0},
    ]
    for number, fields in enumerate(changed):
        _, other = run(engine, tmp_path / f"{number}.png", model="tiny-flux", **fields)
        assert not np.array_equal(first, other), fields


def test_words_that_clip_does_not_see_are_counted(engine: Engine, tmp_path: Path) -> None:
    def notes(prompt: str) -> list[str]:
        plan = engine.plan(Request(model="tiny-flux", prompt=prompt, save=tmp_path / "a.png"))
        return [note.text for note in plan.notes if "CLIP" in note.text]

    assert notes("red " * 75) == []
    assert notes("red " * 80) == ["CLIP does not see its last 5 tokens: it reads 77, T5 12"]


def test_schnell_has_no_guidance_and_no_shift(engine: Engine, tmp_path: Path) -> None:
    plan, pixels = run(engine, tmp_path / "a.png", model="tiny-schnell", size="96x64")
    assert pixels.shape == (64, 96, 3)
    assert plan.flux is not None and plan.flux.guidance is None
    assert plan.sigmas == (1.0, 0.5, 0.0)
    with pytest.raises(RequestError, match="has no guidance input: --guidance 3"):
        run(engine, tmp_path / "b.png", model="tiny-schnell", guidance=3.0)


def test_kontext_looks_at_images(engine: Engine, tmp_path: Path) -> None:
    one = picture(tmp_path / "one.png", 80, 48)
    two = picture(tmp_path / "two.png", 48, 80, seed=5)
    plan, alone = run(engine, tmp_path / "a.png", model="tiny-kontext")
    assert not plan.images
    plan, with_one = run(engine, tmp_path / "b.png", model="tiny-kontext", reference=[one], size="64x64")
    assert [(image.width, image.height) for image in plan.images] == [(80, 48)]
    assert any("is looked at as 80x48" in note.text for note in plan.notes)
    _, with_both = run(engine, tmp_path / "c.png", model="tiny-kontext", reference=[one, two], size="64x64")
    assert not np.array_equal(alone, with_one) and not np.array_equal(with_one, with_both)


def test_fill_makes_what_is_white_in_the_mask(engine: Engine, tmp_path: Path) -> None:
    image = picture(tmp_path / "image.png")
    masks = []
    for number, box in enumerate([(0, 0, 32, 64), (32, 0, 64, 64)]):
        mask = Image.new("L", (64, 64))
        mask.paste(255, box)
        mask.save(tmp_path / f"mask{number}.png")
        masks.append(tmp_path / f"mask{number}.png")
    _, left = run(engine, tmp_path / "a.png", model="tiny-fill", first=image, mask=masks[0])
    _, right = run(engine, tmp_path / "b.png", model="tiny-fill", first=image, mask=masks[1])
    assert not np.array_equal(left, right)
    with pytest.raises(RequestError, match="needs"):
        run(engine, tmp_path / "c.png", model="tiny-fill", first=image)


def test_a_picture_is_painted_over_by_strength(engine: Engine, tmp_path: Path) -> None:
    """The steps are the last ones of the whole schedule; the fewer, the nearer the picture stays to its latents."""
    image = picture(tmp_path / "image.png")
    given = np.array(Image.open(image).convert("RGB")).astype(int)
    far = []
    for strength, count in ((0.25, 1), (0.5, 2), (1.0, 4)):
        plan, pixels = run(
            engine, tmp_path / f"{count}.png", model="tiny-flux", first=image, strength=strength, steps=4, guidance=1.0
        )
        assert plan.task == "image to image" and len(plan.steps) == count
        far.append(np.abs(pixels - given).mean())
    whole, _ = run(engine, tmp_path / "whole.png", model="tiny-flux", steps=4)
    assert plan.steps == whole.steps
    some, _ = run(engine, tmp_path / "some.png", model="tiny-flux", first=image, strength=0.5, steps=4)
    assert some.steps == whole.steps[2:]
    assert len(set(far)) == 3


def test_control_and_redux_images_count(engine: Engine, tmp_path: Path) -> None:
    one, two = picture(tmp_path / "one.png"), picture(tmp_path / "two.png", seed=5)
    for model, field in (("tiny-canny", "control"), ("tiny-redux", "reference")):
        _, with_one = run(engine, tmp_path / f"{model}1.png", model=model, **{field: one})
        plan, with_two = run(engine, tmp_path / f"{model}2.png", model=model, **{field: two})
        assert not np.array_equal(with_one, with_two)
        assert plan.task == "image to image"
    assert {"tiny_siglip.safetensors", "tiny_redux.safetensors"} <= {path.name for path in plan.files}


def test_an_all_in_one_file_makes_the_same_picture(engine: Engine, flux_world: TinyWorld, tmp_path: Path) -> None:
    parts = {
        "flux_dit": transformer("dev"),
        "flux_vae": autoencoder(),
        "t5": transformers_t5(),
        "clip_text": clip_text(),
    }
    state = {PARTS[part] + name: tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    path = write(tmp_path / "flux1-dev-all.safetensors", state)
    _, want = run(engine, tmp_path / "a.png", model="tiny-flux")
    tokenizers = flux_world.root / "text_encoders"
    plan, got = run(
        engine,
        tmp_path / "b.png",
        model="tiny-flux",
        dit=path,
        tokenizer=tokenizers / "google/t5-v1_1-xxl",
        clip_tokenizer=tokenizers / "openai/clip-vit-large-patch14",
    )
    assert np.array_equal(want, got)
    assert {file.suffix for file in plan.files} == {".safetensors", ".model", ".json"}
    assert {ref.files for ref in (plan.vae, plan.text_encoder, *plan.experts.values())} == {(path,)}


def test_tokenizers_of_any_repository_are_taken(flux_world: TinyWorld, tmp_path: Path) -> None:
    for name, folder in (("t5", "google/t5-v1_1-xxl"), ("clip", "openai/clip-vit-large-patch14")):
        shutil.copytree(flux_world.root / "text_encoders" / folder, tmp_path / "models/me" / name)
    settings = flux_world.settings.model_copy(update={"models": (*flux_world.settings.models, tmp_path / "models")})
    asked = Request(
        prompt="a cat", model="tiny-flux", tokenizer="hf:me/t5", clip_tokenizer="hf:me/clip", save=tmp_path / "x.png"
    )
    with Engine(settings) as engine:
        plan = engine.plan(asked)
    assert plan.text_encoder.tokenizer.parent == tmp_path / "models/me/t5"
    assert plan.flux.clip_text.tokenizer.parent == tmp_path / "models/me/clip"


def test_fast_is_near_reference(engine: Engine, tmp_path: Path) -> None:
    _, exact = run(engine, tmp_path / "a.png", model="tiny-flux")
    _, fast = run(engine, tmp_path / "b.png", model="tiny-flux", precision="fast")
    assert 0 < np.abs(exact - fast).mean() < 4


WRONG = {
    "a video": ({"frames": 17}, RequestError, "--frames 17 means nothing"),
    "seconds": ({"seconds": 2}, RequestError, "--seconds 2 means nothing"),
    "a size": ({"size": "60x64"}, RequestError, "multiples of 16"),
    "a mask": ({"mask": "image.png"}, RequestError, "takes no mask"),
    "a feed-forward in parts": ({"ffn_tokens": 64}, RequestError, "has no use for --ffn-tokens 64"),
    "a chunk": ({"chunk": 2}, RequestError, "has no use for --chunk 2"),
    "an embedder without references": (
        {"redux": "style_models/tiny_redux.safetensors"}, RequestError, "flux.1-redux-dev takes it"
    ),
    "a strength without a picture": ({"strength": 0.5}, RequestError, "has no picture to start from"),
    "no tokenizer": ({"clip_tokenizer": "."}, CatalogError, "holds no CLIP tokenizer"),
    "another encoder": ({"text_encoder": "text_encoders/tiny_clip_l.safetensors"}, RequestError, "as --clip-text"),
    "another autoencoder": ({"vae": "diffusion_models/flux_dev.safetensors"}, RequestError, "pass it as --dit"),
    "another transformer": ({"dit": "diffusion_models/flux_schnell.safetensors"}, CheckpointError, "is not tiny-flux"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_means_nothing_is_refused_before_loading(
    engine: Engine, flux_world: TinyWorld, tmp_path: Path, name: str
) -> None:
    fields, kind, words = WRONG[name]
    picture(tmp_path / "image.png")
    root, places = flux_world.root, {"mask": tmp_path, "clip_tokenizer": tmp_path}
    fields = {k: places.get(k, root) / v if isinstance(v, str) and k != "size" else v for k, v in fields.items()}
    assert issubclass(kind, KinemaError)
    with pytest.raises(kind, match=words):
        engine.plan(
            Request.model_validate({"prompt": "a cat", "model": "tiny-flux", "save": tmp_path / "x.png", **fields})
        )


@torch.no_grad()
def test_a_pipeline_of_diffusers_makes_the_same_latents(engine: Engine, flux_world: TinyWorld, tmp_path: Path) -> None:
    """Prompt to latents, with the same noise: encoders, guidance, shift, positions and Euler together."""
    pytest.importorskip("diffusers")
    from safetensors.torch import load_file

    from flux_oracle import latents_of_diffusers

    run(engine, tmp_path / "a.png", model="tiny-flux", steps=3, output="png,latents")
    (file,) = tmp_path.glob("*.safetensors")
    ours = load_file(file)["latents"][:, 0]
    theirs = latents_of_diffusers(flux_world.root, "a red cat", seed=3, steps=3, text_len=12, guidance=3.5)
    assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()
