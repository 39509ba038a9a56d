"""`kinema models ...` in full: plans for every task and card, pulls from a hub of our own, moves that lose nothing."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints import manifest, write_sparse
from conftest import Cli
from kinema.catalog.files import CatalogFile, Store, load_store
from kinema.catalog.moves import carry_out, imports
from kinema.provision import TIERS, Card, preset, provide
from store.hub import FakeHub, running_hub

STORE = load_store()
DATA = random.Random(3).randbytes(300_000)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running_hub() as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        yield fake


@pytest.fixture
def root(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder that is searched and pulled to."""
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setenv("KINEMA_MODELS", str(folder))
    return folder


def fill(hub: FakeHub, repository: str, path: str) -> str:
    hub.add(f"{repository}/{path}", DATA)
    return path.rsplit("/", 1)[-1]


# --- plans ----------------------------------------------------------------------------------------------


def test_more_memory_never_brings_less():
    order = ["Q2_K", "Q3_K_S", "Q4_K_S", "Q5_K_M", "Q6_K", "Q8_0", "fp8_e4m3fn_scaled", "fp16"]
    found = [provide(STORE.models["wan2.2-i2v-a14b"], STORE, Card(tier, 32 * 10**9)).precision for tier in TIERS]
    places = [order.index(name) for name in found]
    assert places == sorted(places) and found[3] == "fp8_e4m3fn_scaled" and found[-1] == "fp16"


def test_the_sums_are_those_of_the_published_sets():
    """The fp8 sets of 24 GB, in GB as a page of file sizes adds them up."""
    expected = {"wan2.2-t2v-a14b": 35.6, "wan2.2-i2v-a14b": 35.6, "wan2.2-ti2v-5b": 18.1, "wan2.2-s2v-14b": 24.0}
    expected |= {"wan2.1-i2v-14b-480p": 24.7, "wan2.1-t2v-14b": 21.3}
    for name, size in expected.items():
        made = provide(STORE.models[name], STORE, Card(24 * 10**9, 32 * 10**9))
        assert made.bytes / 1e9 == pytest.approx(size, abs=0.06), name


def test_loras_are_those_of_each_expert():
    made = provide(STORE.models["wan2.2-i2v-a14b"], STORE, Card(24 * 10**9, 64 * 10**9), with_loras=True)
    names = [file.name for file in made.files if file.role == "lora"]
    assert names == [f"wan2.2_i2v_lightx2v_4steps_lora_v1_{expert}_noise.safetensors" for expert in ("high", "low")]


def test_presets_take_the_nearest_real_file_and_say_so():
    notes = {made.model.name: made.notes for made in preset("16GB", STORE)[1]}
    assert "Q5_K_S" in notes["flux.1-dev"][0] and notes["wan2.2-i2v-a14b"] == ()
    assert "not published" in preset("32gb", STORE)[1][2].notes[0]
    assert [len(preset(name, STORE)[1]) for name in STORE.presets] == [3, 4, 4, 4, 5]


def test_a_preset_says_how_it_runs_too():
    slow = [made for made in preset("24GB", STORE, ram=12 * 10**9)[1] if made.mode == "from disk"]
    assert slow and all("read from disk at every step" in made.notes[-1] for made in slow)


def test_a_plan_says_which_files_and_what_more_would_bring(cli: Cli):
    ran = cli("models", "plan", "--task", "i2v", "--vram", "16GB", "--ram", "32GB")
    assert ran.code == 0 and "wan2.2-i2v-a14b: Q6_K, streamed" in ran.out and "with 24 GB of VRAM" in ran.out
    data = cli("models", "plan", "--task", "i2v", "--vram", "16GB", "--json").events[0]
    assert data["models"][0]["name"] == "wan2.2-i2v-a14b" and data["to_pull"] == data["bytes"] > 3e10


def test_a_small_disk_takes_smaller_files_or_is_told(cli: Cli):
    ran = cli("models", "plan", "--task", "wan2.2-t2v-a14b", "--vram", "24GB", "--disk", "25GB", "--json")
    assert ran.events[0]["bytes"] <= 25e9
    ran = cli("models", "plan", "--task", "wan2.2-t2v-a14b", "--vram", "24GB", "--disk", "5GB")
    assert ran.code == 5 and "needs" in ran.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("plan --task video --vram 16GB", 3, "tasks: t2v"),
        ("plan --vram lots", 2, "--vram 'lots' is no amount of memory"),
        ("plan --preset 20GB", 3, "there are 8GB, 12GB"),
        ("plan --preset 16GB --task i2v", 2, "leave one out"),
        ("plan --preset 16GB --vram 8GB", 2, "leave one out"),
        ("pull", 2, "nothing to pull"),
        ("pull ae.safetensors --to x", 3, "cannot be reached"),
        ("pull ae.safetensors --to [/x]", 3, "cannot be reached"),
        ("pull high_noise_model.safetensors", 2, "may be"),
        ("pull hf:nothing", 3, "names no repository"),
        ("search wan9.9_t2v.safetensors", 3, "no file is called"),
        ("search", 2, "kinema models search of what?"),
        ("where wan2.2-t2v-a14b", 3, "no file of wan2.2-t2v-a14b is installed"),
        ("verify nowhere.safetensors", 3, "no such file or folder"),
        ("import nowhere", 3, "is no folder"),
        ("migrate nowhere there", 3, "is no folder"),
        ("list --vrm 16GB", 2, "--vrm is no flag of kinema models"),
        ("serch x", 2, "did you mean: kinema models search"),
        ("plan --vrm 16GB", 2, "did you mean --vram"),
    ],
)
def test_bad_words_are_answered(
    cli: Cli, root: Path, monkeypatch: pytest.MonkeyPatch, words: str, code: int, said: str
):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("kinema.catalog.hub.TRIES", 1)
    ran = cli("models", *words.split())
    assert (ran.code, said in ran.err) == (code, True), ran.err


def test_a_name_is_searched_shown_and_answered(cli: Cli, root: Path):
    assert "Q5_K_S is nearest" in cli("models", "search", "FLUX", "Q5_K_M").out
    shown = cli("models", "show", "wan2.2-s2v-14b")
    assert "speaks or sings" in shown.out and "wav2vec2_large_english_fp16.safetensors" in shown.out
    one = cli("models", "show", "flux1-dev-fp8.safetensors").out
    assert "17,244,293,693" in one and "Kijai/flux-fp8" in one, "both files of that name are shown"


# --- pulls ------------------------------------------------------------------------------------------------


def test_a_file_of_the_catalog_is_pulled_to_its_folder(cli: Cli, root: Path, hub: FakeHub):
    name = fill(hub, "alibaba-pai/Wan2.1-Fun-Reward-LoRAs", "Wan2.1-Fun-14B-InP-MPS.safetensors")
    ran = cli("models", "pull", name, "--json")
    assert ran.code == 0 and ran.events[-1]["paths"] == [str(root / "loras" / name)]
    assert any(event.get("unit") == "bytes" for event in ran.events)
    assert (root / "loras" / name).read_bytes() == DATA
    assert cli("models", "where", name).paths == [root / "loras" / name]
    verified = cli("models", "verify", "--full", "--json").events
    assert [event["finding"] for event in verified] == ["right"] and verified[0]["by"] == "hash"


def test_a_gated_file_is_answered_with_its_open_copy(cli: Cli, root: Path, hub: FakeHub):
    hub.add("black-forest-labs/FLUX.1-dev/ae.safetensors", DATA, gated=True)
    ran = cli("models", "pull", "black-forest-labs/FLUX.1-dev/ae.safetensors")
    assert ran.code == 3 and "is gated" in ran.err and "HF_TOKEN=" in ran.err
    (open_copy,) = [line.rsplit(" ", 1)[1] for line in ran.err.splitlines() if "needs no login" in line]
    hub.add(open_copy, DATA)
    assert cli("models", "pull", open_copy).paths == [root / "vae/ae.safetensors"]


def test_a_repository_is_pulled_and_generate_takes_its_address(cli: Cli, root: Path, hub: FakeHub):
    fill(hub, "me/mine", "a.bin")
    fill(hub, "me/mine", "sub/b.bin")
    ran = cli("generate", "a cat", "--model", "hf:me/mine")
    assert ran.code == 3 and "kinema models pull hf:me/mine" in ran.err
    ran = cli("generate", "a cat", "--model", "demo", "--lora", "hf:me/mine:a.bin:0.5")
    assert ran.code == 3 and "kinema models pull hf:me/mine:a.bin" in ran.err
    assert cli("models", "pull", "hf:me/mine:sub/*").code == 0
    assert (root / "me/mine/sub/b.bin").read_bytes() == DATA and not (root / "me/mine/a.bin").exists()


def test_damage_is_an_exit_code(cli: Cli, root: Path):
    write_sparse(root / "vae/wan_2.1_vae.safetensors", manifest("wan2.1_vae"))
    os.truncate(root / "vae/wan_2.1_vae.safetensors", 1_000_000)
    ran = cli("models", "verify")
    assert ran.code == 4 and ran.out.startswith("truncated")


def test_generate_says_what_to_pull_and_its_size(cli: Cli, root: Path):
    ran = cli("generate", "a cat", "--model", "wan2.1-t2v-1.3b")
    assert ran.code == 3
    assert (
        "kinema models pull wan2.1-t2v-1.3b" in ran.err and " GB: " in ran.err and "wan_2.1_vae.safetensors" in ran.err
    )


def test_generate_pulls_what_lacks_where_it_is_asked(cli: Cli, root: Path, hub: FakeHub):
    write_sparse(root / "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors", manifest("wan2.1_t2v_1.3B"))
    ran = cli("generate", "a cat", "--model", "wan2.1-t2v-1.3b", "--pull")
    assert ran.code == 3 and "no repository Comfy-Org" in ran.err, "it asked the hub, which has nothing"
    assert any("wan_2.1_vae" in line for line in hub.log) and not any("t2v_1.3B" in line for line in hub.log)


def test_generate_pulls_the_very_files_it_names(cli: Cli, root: Path, hub: FakeHub):
    """Those for the memory that is asked for, not for all that the machine has."""
    card = ("--vram", "8GB", "--ram", "16GB")
    words = ("generate", "a cat", "--model", "wan2.1-t2v-14b", *card)
    named = cli(*words, "--json").error
    files = named["details"]["files"]
    assert "kinema models pull wan2.1-t2v-14b --vram 8GB --ram 16GB " in named["hint"]
    (planned,) = cli("models", "plan", "--task", "wan2.1-t2v-14b", *card, "--json").events[0]["models"]
    assert files[0] == "{repository}/{path}".format(**planned["files"][0])
    assert all(file.rsplit("/", 1)[1] in named["hint"] for file in files)
    assert cli(*words, "--pull").code == 3, "the hub has nothing"
    repository, path = files[0].split("/", 2)[:2], files[0].split("/", 2)[2]
    assert f"HEAD /{'/'.join(repository)}/resolve/main/{path}" in hub.log


def test_of_several_installed_sets_one_is_chosen_and_said(cli: Cli, root: Path):
    for name in ("wan2.1_t2v_1.3B_fp16", "wan2.1_t2v_1.3B_bf16"):
        write_sparse(root / f"diffusion_models/{name}.safetensors", manifest("wan2.1_t2v_1.3B"), "F16")
    write_sparse(root / "vae/wan_2.1_vae.safetensors", manifest("wan2.1_vae"))
    write_sparse(root / "text_encoders/umt5_xxl_fp16.safetensors", manifest("umt5_xxl_encoder_official"))
    ran = cli("plan", "a cat", "--model", "wan2.1-t2v-1.3b", "--device", "cpu")
    assert ran.code == 3 and "tokenizer" in ran.err
    from tiny_world import spiece_model

    (root / "text_encoders/spiece.model").write_bytes(spiece_model())
    ran = cli("plan", "a cat", "--model", "wan2.1-t2v-1.3b", "--device", "cpu")
    assert ran.code == 0 and "of 2 installed sets, wan2.1_t2v_1.3B_" in ran.out


def test_half_a_repository_in_the_hubs_cache_hides_no_whole_files(cli: Cli, root: Path, monkeypatch, tmp_path: Path):
    from tiny_world import spiece_model

    snapshot = tmp_path / "hub/models--Wan-AI--Wan2.1-T2V-1.3B/snapshots/c1"
    snapshot.mkdir(parents=True)
    (snapshot / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    ran = cli("plan", "a cat", "--model", "wan2.1-t2v-1.3b", "--device", "cpu")
    assert ran.code == 4 and "diffusion_pytorch_model" in ran.err, "with nothing else it is told"
    write_sparse(root / "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors", manifest("wan2.1_t2v_1.3B"), "F16")
    write_sparse(root / "vae/wan_2.1_vae.safetensors", manifest("wan2.1_vae"))
    write_sparse(root / "text_encoders/umt5_xxl_fp16.safetensors", manifest("umt5_xxl_encoder_official"))
    (root / "text_encoders/spiece.model").write_bytes(spiece_model())
    ran = cli("plan", "a cat", "--model", "wan2.1-t2v-1.3b", "--device", "cpu")
    assert ran.code == 0 and "wan2.1_t2v_1.3B_fp16.safetensors" in ran.out


# --- moves ---------------------------------------------------------------------------------------------------


def test_import_links_known_files_of_a_comfyui_and_a_hub_cache(cli: Cli, root: Path, tmp_path: Path):
    comfy = tmp_path / "ComfyUI"
    (comfy / "models/loras/sub").mkdir(parents=True)
    (comfy / "folder_paths.py").write_text("")
    lora = comfy / "models/loras/sub/Wan2.1-Fun-14B-InP-MPS.safetensors"
    lora.write_bytes(DATA)
    (comfy / "models/loras/mine.safetensors").write_bytes(DATA)
    ran = cli("models", "import", comfy)
    target = root / "loras" / lora.name
    assert ran.code == 0 and target.samefile(lora) and not (root / "loras/mine.safetensors").exists()
    assert "0 files" in cli("models", "import", comfy).out, "the second time there is nothing to do"
    blob = tmp_path / "hub/models--Wan-AI--Wan2.1-T2V-1.3B/blobs/abc"
    snapshot = tmp_path / "hub/models--Wan-AI--Wan2.1-T2V-1.3B/snapshots/c1/google/umt5-xxl"
    for folder in (blob.parent, snapshot):
        folder.mkdir(parents=True)
    blob.write_bytes(b"pieces")
    (snapshot / "spiece.model").symlink_to(blob)
    assert cli("models", "import", tmp_path / "hub").code == 0
    assert (root / "text_encoders/google/umt5-xxl/spiece.model").samefile(blob)


def test_import_leaves_out_what_has_another_length(cli: Cli, root: Path, tmp_path: Path):
    other = tmp_path / "other/vae/wan_2.1_vae.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(DATA)
    ran = cli("models", "import", tmp_path / "other")
    assert "left out" in ran.out and "253815318" in ran.out.replace(",", "") and not (root / "vae").exists()


def test_what_is_imported_already_is_not_left_out(tmp_path: Path):
    rows = tuple(
        CatalogFile(repository=f"{name}/r", path="x.pth", folder="vae", role="vae", bytes=size, size="exact")
        for name, size in (("a", 3), ("b", 4))
    )
    other, store = tmp_path / "other", Store(rows, {})
    (other / "vae").mkdir(parents=True)
    (other / "vae/x.pth").write_bytes(b"abc")
    moves, left = imports(other, tmp_path / "models", store)
    assert [move.target for move in moves] == [tmp_path / "models/vae/x.pth"] and left == []
    carry_out(moves)
    assert imports(other, tmp_path / "models", store) == ([], [])


def test_a_move_that_fails_is_told(cli: Cli, tmp_path: Path):
    (tmp_path / "old/vae").mkdir(parents=True)
    (tmp_path / "old/vae/a.pth").write_bytes(DATA)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/vae").write_text("a file where a folder belongs")
    ran = cli("models", "migrate", tmp_path / "old", tmp_path / "new", "--yes")
    assert ran.code == 5 and "cannot move" in ran.err and (tmp_path / "old/vae/a.pth").read_bytes() == DATA


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("link", [False, True])
def test_migrate_lists_first_then_moves_and_tells_comfyui(cli: Cli, tmp_path: Path, link: bool):
    comfy, new = tmp_path / "ComfyUI", tmp_path / "volume/models"
    for name in ("vae/a.pth", "loras/sub/b.safetensors", "unet/c.gguf"):
        (comfy / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        (comfy / "models" / name).write_bytes(name.encode())
    (comfy / "folder_paths.py").write_text("")
    before = hashes(comfy / "models")
    words = ("models", "migrate", comfy, new, *(["--link"] if link else []))
    ran = cli(*words)
    assert (
        ran.code == 0 and "nothing was done yet" in ran.err and not new.exists() and hashes(comfy / "models") == before
    )
    assert cli(*words, "--yes").code == 0
    assert hashes(new) == before and bool(hashes(comfy / "models")) == link
    assert f"base_path: {new}" in (comfy / "extra_model_paths.yaml").read_text()
    found = cli("models", "paths", "--models-dir", comfy, "--json").events[0]
    assert str(new / "vae") in found["folders"]["vae"]


def test_migrate_stops_at_another_file_of_the_same_name(cli: Cli, tmp_path: Path):
    old, new = tmp_path / "old/vae/a.pth", tmp_path / "new/vae/a.pth"
    for path, data in ((old, b"one"), (new, b"other")):
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    ran = cli("models", "migrate", tmp_path / "old", tmp_path / "new", "--yes")
    assert ran.code == 3 and "another file" in ran.err and old.read_bytes() == b"one" and new.read_bytes() == b"other"


def test_prune_takes_only_what_broken_pulls_left(cli: Cli, root: Path, hub: FakeHub):
    name = fill(hub, "alibaba-pai/Wan2.1-Fun-Reward-LoRAs", "Wan2.1-Fun-14B-InP-MPS.safetensors")
    cli("models", "pull", name)
    part = root / "loras/.kinema/x.safetensors.part"
    part.write_bytes(b"half")
    before = (root / "loras" / name).read_bytes()
    assert "remove" in cli("models", "prune").out and part.exists()
    assert cli("models", "prune", "--yes").code == 0 and not part.exists()
    assert (root / "loras" / name).read_bytes() == before and (root / f"loras/.kinema/{name}.json").exists()


def test_usage_counts_linked_bytes_once(cli: Cli, root: Path):
    (root / "vae").mkdir()
    (root / "vae/a.pth").write_bytes(DATA)
    os.link(root / "vae/a.pth", root / "vae/b.pth")
    data = cli("models", "du", "--json").events[0]
    assert data == {str(root / "vae"): len(DATA)}


def test_paths_are_printed(cli: Cli, root: Path):
    ran = cli("models", "paths")
    assert str(root) in ran.out and f"pulled files go to: {root}" in ran.out
