"""LoRA from the command line: in one flag, in prompt files, in replays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import official_state
from conftest import Cli
from lora_files import low_rank, write_lora
from tiny_world import DITS, TinyWorld

SHAPES = {name: tuple(tensor.shape) for name, tensor in official_state("dit", DITS["t2v"]).items()}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "my style, v1:2@home.safetensors", "kohya", low_rank(SHAPES))


def latents(path: Path) -> torch.Tensor:
    return load_file(path)["latents"]


RUN = ("generate", "a cat walks", "--model", "tiny-t2v", "--seed", "3", "--device", "cpu", "--precision", "reference")


def test_flags_prompt_files_and_json_mean_the_same(tiny: Cli, lora: Path) -> None:
    flags = tiny(
        *RUN, "--lora", f"{lora}:0.7,skip=blocks.1", "--lora", f"{lora}:-0.2", "--save", "a.latents.safetensors"
    )
    assert flags.code == 0, flags.err
    assert "20 of 20 parts matched (kohya names, 20 lora, rank 4), 10 of them chosen, strength 0.7" in flags.err
    line = f'a cat walks --seed 3 --lora "{lora}:0.7,skip=blocks.1" --lora "{lora}:-0.2" --save b.latents.safetensors'
    Path("lines.txt").write_text(line)
    assert tiny("generate", "--from-file", "lines.txt", *RUN[2:4], *RUN[6:]).code == 0
    row = {"prompt": "a cat walks", "seed": 3, "save": "c.latents.safetensors",
           "lora": [{"path": str(lora), "strength": 0.7, "skip": ["blocks.1"]}, f"{lora}:-0.2"]}  # fmt: skip
    Path("lines.jsonl").write_text(json.dumps(row))
    assert tiny("generate", "--from-file", "lines.jsonl", "--fresh", *RUN[2:4], *RUN[6:]).code == 0
    a, b, c = (latents(Path(f"{name}.latents.safetensors")) for name in "abc")
    assert torch.equal(a, b) and torch.equal(a, c)
    assert tiny(*RUN, "--save", "d.latents.safetensors").code == 0
    assert not torch.equal(a, latents(Path("d.latents.safetensors")))


def test_the_plan_shows_each_lora(tiny: Cli, lora: Path) -> None:
    shown = tiny("plan", *RUN[1:], "--lora", f"{lora}:0.7")
    assert shown.code == 0 and "20 of 20 parts matched (kohya names" in shown.out
    (made,) = tiny("plan", *RUN[1:], "--lora", f"{lora}:0.7", "--json").events
    assert made["loras"][0]["matched"] == 20 and made["steps"][0]["loras"] == [0.7]


def test_replay_runs_the_same_lora_and_refuses_a_changed_one(tiny: Cli, lora: Path) -> None:
    assert tiny(*RUN, "--lora", f"{lora}", "--save", "a.latents.safetensors").code == 0
    again = tiny("replay", "a.latents.safetensors")
    assert again.code == 0, again.err
    assert torch.equal(latents(again.paths[0]), latents(Path("a.latents.safetensors")))
    write_lora(lora, "kohya", low_rank(SHAPES, scale=3.0))
    changed = tiny("replay", "a.latents.safetensors")
    assert changed.code == 4 and lora.name in changed.err and "changed" in changed.err


# --- kinema lora ---------------------------------------------------------------------------------------


def test_inspect_says_what_it_is_and_how_it_fits(tiny: Cli, lora: Path, tiny_world: TinyWorld) -> None:
    alone = tiny("lora", "inspect", lora)
    assert alone.code == 0 and "kohya, for Wan" in alone.out and "20 lora" in alone.out
    dit = tiny_world.file("diffusion_models/t2v.safetensors")
    told = tiny("lora", "inspect", lora, "--dit", dit)
    assert "20 of 20" in told.out and "% of the norm" in told.out
    (data,) = tiny("lora", "inspect", lora, "--dit", dit, "--json").events
    assert data["dialect"] == "kohya" and data["ranks"] == [4] and data["scales"] == [0.5] and data["change"] > 0.01
    assert tiny("lora", "inspect", dit).code == 4


def test_convert_extract_and_merge_go_round(tiny: Cli, lora: Path, tiny_world: TinyWorld) -> None:
    """A LoRA in other names, merged into a model, taken out again: the same video as the LoRA itself."""
    dit = tiny_world.file("diffusion_models/t2v.safetensors")
    made = tiny("lora", "convert", lora, "b.safetensors", "--to", "diffusers")
    assert made.code == 0 and made.paths == [Path("b.safetensors")]
    assert tiny("lora", "merge", dit, "m.safetensors", "--lora", "b.safetensors:1").code == 0
    assert tiny("lora", "extract", dit, "m.safetensors", "c.safetensors", "--rank", "4", "--dtype", "float32").code == 0
    save = iter("wxyz")
    want, *others = (
        latents(tiny(*RUN, *words, "--save", f"{next(save)}.latents.safetensors").paths[0])
        for words in (
            ("--lora", lora),
            ("--lora", "b.safetensors"),
            ("--lora", "c.safetensors"),
            ("--dit", "m.safetensors"),
        )
    )
    for got in others:
        assert float((got - want).abs().max() / want.abs().max()) < 2e-5


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("lora",), 0, ""),
        (("lora", "inspekt", "x"), 2, "lora inspect"),
        (("lora", "inspect"), 2, "no file"),
        (("lora", "convert", "LORA", "b.safetensors"), 2, "--to"),
        (("lora", "convert", "LORA", "b.safetensors", "--to", "kohyo"), 2, "pass --to kohya"),
        (("plan", "a cat", "--model", "tiny-t2v", "--lora", "x:abc:"), 3, "x:abc:: no such file"),
        (("lora", "convert", "LORA", "b.safetensors", "--too", "kohya"), 2, "did you mean --to"),
        (("lora", "convert", "lost.safetensors", "b.safetensors", "--to", "kohya"), 4, "lost.safetensors"),
        (("lora", "extract", "LORA", "LORA", "b.safetensors"), 4, "LoRA"),
        (("lora", "extract", "LORA", "LORA", "b.safetensors", "--dtype", "fp4"), 2, "bfloat16"),
        (("lora", "merge", "LORA", "b.safetensors", "--lora", "LORA,steps=3-1"), 2, "3-1"),
    ],
)
def test_faults_of_the_lora_verbs(tiny: Cli, lora: Path, words: tuple[str, ...], code: int, told: str) -> None:
    ran = tiny(*(word.replace("LORA", str(lora)) for word in words))
    assert ran.code == code and told in ran.err + ran.out, ran.err
    assert not Path("b.safetensors").exists()
