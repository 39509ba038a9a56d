"""The catalog's tables are whole: every row means something, every name people use finds its file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kinema.catalog import load_catalog
from kinema.catalog.choice import kind, offers, part_offers
from kinema.catalog.files import CatalogFile, alternatives, find_files, load_store, search
from kinema.catalog.folders import KEYS
from kinema.catalog.table import named
from kinema.errors import CatalogError

STORE = load_store()

SEED_FILES = """
wan_2.1_vae.safetensors wan2.2_vae.safetensors umt5_xxl_fp8_e4m3fn_scaled.safetensors
wav2vec2_large_english_fp16.safetensors clip_vision_h.safetensors
wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors
wan2.2_s2v_14B_fp8_scaled.safetensors Wan2_2-Animate-14B_fp8_e4m3fn_scaled_KJ.safetensors
wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors
wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors
WanAnimate_relight_lora_fp16.safetensors lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors
flux1-dev-fp8.safetensors clip_l.safetensors t5xxl_fp8_e4m3fn.safetensors ae.safetensors
models_t5_umt5-xxl-enc-bf16.pth models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth Wan2.1_VAE.pth
diffusion_models/wan2.2_s2v_14B_fp8_scaled.safetensors loras/WanAnimate_relight_lora_fp16.safetensors
wan2.2_i2v_high_noise_14B_fp8_scaled Wan2_2-Animate-14B_fp8_e4m3fn_scaled_KJ WanAnimate_relight
lightx2v_I2V_14B_480p fun_camera fun_control fun_inpaint UmT5-XXL
"""
"""Spellings of files in the guides people follow, each published under it or found by its words."""

SEED_WORDS = (
    "FLUX Q3_K_S", "FLUX Q4_0", "FLUX Q4_1", "FLUX Q5_0", "FLUX Q6_K", "FLUX Q8_0", "I2V Q3_K_S", "T2V Q4_0",
    "I2V Q4_K_M", "T2V Q5_0", "I2V Q5_K_M", "T2V Q6_K", "I2V Q8_0", "VACE-Fun Q8_0", "VACE Q3_K_M", "VACE Q5_K_S",
    "VACE Q6_K", "fun control 5B", "fun inpaint 5B", "fun control 14B", "fun inpaint 14B", "CLIP vision",
)  # fmt: skip

NEVER_PUBLISHED = {
    "wan2.2_t2v_14B_fp8_scaled.safetensors": "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
    "Wan-Lab/Wan2.2": "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors",
    "wan_vae.safetensors": "wan_2.1_vae.safetensors",
    "FLUX Q4_K_M": "flux1-dev-Q4_K_S.gguf",
    "FLUX Q5_K_M": "flux1-dev-Q5_K_S.gguf",
    "I2V F16": "wan2.2_i2v_low_noise_14B_fp16.safetensors",
    "T2V F16": "wan2.2_t2v_low_noise_14B_fp16.safetensors",
    "VACE FP16/BF16": "wan2.1_vace_14B_fp16.safetensors",
    "lightx2v_4steps_high_noise": "wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors",
    "lightx2v_4steps_low_noise": "wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors",
}
"""Names of those guides that are no file, and what is meant."""

SEED_MODELS = {
    "t2v-A14B": "wan2.2-t2v-a14b",
    "Wan2.2-T2V-A14B": "wan2.2-t2v-a14b",
    "Wan2.2-I2V-A14B": "wan2.2-i2v-a14b",
    "Wan2.2-TI2V-5B": "wan2.2-ti2v-5b",
    "Wan2.2-S2V-14B": "wan2.2-s2v-14b",
    "Wan2.2-Animate-14B": "wan2.2-animate-14b",
    "Wan-AI/Wan2.2-T2V-A14B": "wan2.2-t2v-a14b",
    "t2v-1.3B": "wan2.1-t2v-1.3b",
    "t2v-14B": "wan2.1-t2v-14b",
    "flf2v-14B": "wan2.1-flf2v-14b",
    "FLUX.1-dev": "flux.1-dev",
    "FLUX 1": "flux.1-dev",
}


@pytest.mark.parametrize("name", SEED_FILES.split())
def test_a_file_is_found_by_the_name_people_use(name: str):
    found = find_files(name, STORE)
    assert found.files and not found.note
    if "." in name[-12:]:
        assert {file.name for file in found.files} == {name.rsplit("/", 1)[-1]}


@pytest.mark.parametrize(
    ("spelled", "repository"),
    [
        ("https://huggingface.co/Comfy-Org/flux1-dev/resolve/main/flux1-dev-fp8.safetensors", "Comfy-Org/flux1-dev"),
        ("https://hf-mirror.com/Wan-AI/Wan2.1-T2V-14B/blob/main/Wan2.1_VAE.pth?download=true", "Wan-AI/Wan2.1-T2V-14B"),
        ("/workspace/ComfyUI/models/clip/clip_l.safetensors", "comfyanonymous/flux_text_encoders"),
        ("https://huggingface.co/Wan-Lab/Wan2.2/resolve/main/wan2.2_t2v_14B_fp8_scaled.safetensors",
         "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"),
        ("google/umt5-xxl", "Wan-AI/Wan2.1-T2V-1.3B"),
    ],
)  # fmt: skip
def test_addresses_and_paths_of_guides_are_understood(spelled: str, repository: str):
    assert repository in {file.repository for file in find_files(spelled, STORE).files}


@pytest.mark.parametrize("words", SEED_WORDS)
def test_words_find_files_of_every_word(words: str):
    found = search(words, STORE)
    assert found
    for file in found:
        text = " ".join((file.repository, file.path, file.precision, file.role, *file.used_by)).lower()
        assert all(word in text for word in words.lower().replace("-", " ").split())


@pytest.mark.parametrize("name", NEVER_PUBLISHED)
def test_a_name_that_was_never_published_is_answered_with_the_real_one(name: str):
    found = find_files(name, STORE)
    assert NEVER_PUBLISHED[name] in {file.name for file in found.files}
    assert "never published" in found.note


@pytest.mark.parametrize("name", SEED_MODELS)
def test_a_model_is_found_by_its_official_name(name: str):
    found = named(name, STORE.published)
    assert found is not None and found.name == SEED_MODELS[name]


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(CatalogError, match=r"wan2\.9") as caught:
        find_files("wan2.9_t2v_high_noise_14B_fp16.safetensors", STORE)
    assert "wan2.2_t2v_high_noise_14B_fp16.safetensors" in caught.value.hint


def test_every_rename_names_something_real():
    for name, renamed in STORE.renames.items():
        for real in renamed.real:
            assert find_files(real, STORE).files, name


def test_rows_are_distinct_and_sound():
    keys = [(file.repository, file.path) for file in STORE.files]
    assert len(keys) == len(set(keys)) > 1060
    for file in STORE.files:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", file.repository) and ".." not in file.path, file
        assert (file.bytes is None) == (file.size is None), file
        assert file.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", file.sha256), file
        assert file.precision and file.role, file


def test_no_two_files_of_a_set_want_the_same_place():
    for model in STORE.published.values():
        for offer in offers(model, STORE):
            places = [file.place for file in offer.files]
            assert len(places) == len(set(places)), places


@pytest.mark.parametrize("item", STORE.published.values(), ids=lambda item: item.name)
def test_every_set_has_its_files(item):
    assert offers(item, STORE)
    assert all(part_offers(part, STORE) for part in item.parts.values())
    assert item.use and item.tasks


def test_every_role_of_a_model_has_a_published_file():
    known = {file.name for file in STORE.files}
    for name, entry in load_catalog().items():
        for role, places in entry.files.items():
            assert name == "demo" or not places or known & {place.rsplit("/", 1)[-1] for place in places}, (name, role)


def test_gated_files_have_open_copies_where_there_are_some():
    (gated,) = [
        f for f in STORE.files if f.repository == "black-forest-labs/FLUX.1-schnell" and f.name == "ae.safetensors"
    ]
    assert gated.gated
    assert "Comfy-Org/Lumina_Image_2.0_Repackaged" in {file.repository for file in alternatives(gated, STORE)}


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("bf16", "16-bit"), ("F16", "16-bit"), ("fp8_e4m3fn_scaled_kj_v2", "fp8_scaled"), ("fp8_e4m3fn", "fp8"),
     ("Q4_K_M", "Q4_K_M"), ("svdq_int4_r32", None), ("nf4_bnb", None), ("int8_quanto", "int8"),
     ("int8_convrot", "int8"), ("nvfp4", None)],
)  # fmt: skip
def test_a_precision_is_one_that_is_read_or_none(precision: str, expected: str | None):
    assert kind(precision) == expected


# --- rows of the user ------------------------------------------------------------------------------

OWN = """
[repositories."me/mine"]
licence = "mit"
[[repositories."me/mine".files]]
path = "my_t2v.safetensors"
folder = "diffusion_models"
role = "dit"
precision = "fp16"
used_by = ["wan2.1-t2v-1.3b"]
bytes = 5
size = "exact"
"""


def test_rows_of_the_user_come_first(tmp_path: Path):
    file = tmp_path / "own.toml"
    file.write_text(OWN)
    store = load_store((file,))
    assert store.files[0].repository == "me/mine" and store.files[0].licence == "mit"
    assert (
        offers(store.models["wan2.1-t2v-1.3b"], store)[1].files[0].repository == "me/mine"
        or offers(store.models["wan2.1-t2v-1.3b"], store)[0].files[0].repository == "me/mine"
    )
    assert load_catalog((file,)) == load_catalog()


@pytest.mark.parametrize(
    ("row", "word"),
    [("{ path = 'x' }", "role"), ("{ path = 'x', role = 'dit', size = 'huge' }", "size"), ("'x.safetensors'", "table")],
)
def test_a_row_that_is_no_file_is_refused_with_its_place(tmp_path: Path, row: str, word: str):
    file = tmp_path / "own.toml"
    file.write_text(f'[repositories."me/mine"]\nfiles = [{row}]')
    with pytest.raises(CatalogError, match="me/mine, file 1") as caught:
        load_store((file,))
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("data", "word"),
    [(b"# caf\xe9", "is not TOML"), (b"[models", "is not TOML"), (b"[model.x]", "unknown tables: model")],
)
@pytest.mark.parametrize("load", [load_catalog, load_store])
def test_a_file_that_is_no_catalog_is_refused(tmp_path: Path, load, data: bytes, word: str):
    file = tmp_path / "own.toml"
    file.write_bytes(data)
    with pytest.raises(CatalogError, match=word):
        load((file,))


def test_folders_are_those_of_comfyui():
    known = {name for names in KEYS.values() for name in names} | {
        "xlabs",
        "ipadapter-flux",
        "pulid",
        "text_encoders/google",
    }
    assert {file.folder for file in STORE.files if file.folder} <= known


def test_shards_are_spelled_out():
    file = CatalogFile(repository="a/b", path="x/m.safetensors.index.json", role="dit", shards=2)
    assert file.paths == (
        "x/m.safetensors.index.json", "x/m-00001-of-00002.safetensors", "x/m-00002-of-00002.safetensors",
    )  # fmt: skip


LIGHT = "import time, sys; import kinema.provision as p; from kinema.catalog.files import load_store\n"
LIGHT += "t = time.process_time(); load_store(); print(time.process_time() - t, 'torch' in sys.modules)"


def test_reading_the_tables_is_quick_and_needs_no_torch():
    runs = [
        subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True).stdout.split() for _ in range(2)
    ]
    assert runs[0][1] == "False" and min(float(run[0]) for run in runs) < 0.5
