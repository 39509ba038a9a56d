"""Where files are looked for: ComfyUI's answer in every case of conflict, repository folders, the hub's cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kinema.catalog.files import CatalogFile
from kinema.catalog.folders import Folders, comfy_folders, models_folder
from kinema.errors import CatalogError
from kinema.schema import Settings
from kinema.settings import configure


def touch(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text or str(path))
    return path


@pytest.fixture
def comfy(tmp_path: Path) -> Path:
    """A ComfyUI folder, as its own program recognises it."""
    root = tmp_path / "ComfyUI"
    touch(root / "folder_paths.py")
    (root / "models").mkdir()
    return root


def search(
    root: Path, yaml: str = "", extra: tuple[Path, ...] = (), variables: dict[str, str] | None = None
) -> Folders:
    if yaml:
        touch(root / "extra_model_paths.yaml", yaml)
    by_key = comfy_folders((root,), extra, variables)
    return Folders((models_folder(root)[0],), by_key)


def order(folders: Folders, key: str, root: Path) -> list[str]:
    return [os.path.relpath(folder, root) for folder in folders.by_key[key]]


# --- order -----------------------------------------------------------------------------------------


def test_without_a_yaml_unet_comes_before_diffusion_models(comfy: Path):
    folders = search(comfy)
    assert order(folders, "diffusion_models", comfy) == [
        "models/unet",
        "models/diffusion_models",
        "output/diffusion_models",
    ]
    assert order(folders, "text_encoders", comfy) == ["models/text_encoders", "models/clip", "output/clip"]
    old, new = touch(comfy / "models/unet/a.safetensors"), touch(comfy / "models/diffusion_models/a.safetensors")
    assert folders.find("diffusion_models", "a.safetensors") == folders.find("unet", "a.safetensors") == old
    old.unlink()
    assert folders.find("diffusion_models", "a.safetensors") == new


def test_paths_of_a_yaml_come_after_the_built_in_ones_and_before_output(comfy: Path):
    folders = search(comfy, "volume:\n  base_path: /vol\n  vae: vae/\n")
    assert [str(p) for p in folders.by_key["vae"]] == [str(comfy / "models/vae"), "/vol/vae", str(comfy / "output/vae")]
    assert touch(comfy / "models/vae/x.pth") == folders.find("vae", "x.pth")


def test_is_default_goes_in_front_and_reverses_several_lines(comfy: Path):
    folders = search(comfy, "a:\n  base_path: /vol\n  is_default: true\n  vae: |\n    one\n    two\n    three\n")
    assert [str(path) for path in folders.by_key["vae"][:4]] == [
        "/vol/three", "/vol/two", "/vol/one", str(comfy / "models/vae"),
    ]  # fmt: skip


def test_several_lines_without_is_default_keep_their_order(comfy: Path):
    folders = search(comfy, "a:\n  base_path: /vol\n  loras: |\n    one\n    two\n")
    assert [str(path) for path in folders.by_key["loras"][1:3]] == ["/vol/one", "/vol/two"]


def test_old_and_new_names_of_a_yaml_merge_in_the_order_of_the_file(comfy: Path):
    yaml = "a:\n  base_path: /v\n  diffusion_models: dm\n  unet: un\n  clip: cl\n  text_encoders: te\n"
    folders = search(comfy, yaml)
    assert [str(path) for path in folders.by_key["diffusion_models"][2:4]] == ["/v/dm", "/v/un"]
    assert [str(path) for path in folders.by_key["text_encoders"][2:4]] == ["/v/cl", "/v/te"]


def test_two_sections_keep_their_order_and_the_later_default_wins(comfy: Path):
    yaml = "a:\n  base_path: /a\n  is_default: true\n  vae: v\nb:\n  base_path: /b\n  is_default: true\n  vae: v\n"
    assert [str(path) for path in search(comfy, yaml).by_key["vae"][:2]] == ["/b/v", "/a/v"]


def test_a_built_in_path_named_again_moves_only_to_the_front(comfy: Path):
    again = f"a:\n  base_path: {comfy}\n  vae: models/vae\n"
    assert order(search(comfy, again), "vae", comfy) == ["models/vae", "output/vae"]
    yaml = f"a:\n  base_path: {comfy}\n  is_default: true\n  unet: models/diffusion_models\n"
    assert order(search(comfy, yaml), "diffusion_models", comfy)[:2] == ["models/diffusion_models", "models/unet"]


# --- spellings of a yaml -----------------------------------------------------------------------------


def test_paths_are_relative_to_the_yaml_where_it_names_no_root(comfy: Path):
    assert search(comfy, "a:\n  vae: ../shared/vae\n").by_key["vae"][1] == comfy.parent / "shared/vae"


def test_a_relative_root_counts_from_the_yaml(comfy: Path):
    assert search(comfy, "a:\n  base_path: ../vol\n  vae: v\n").by_key["vae"][1] == comfy.parent / "vol/v"


def test_home_and_variables_are_expanded_in_the_root(comfy: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/people/me")
    yaml = "a:\n  base_path: ~/m\n  vae: v\nb:\n  base_path: $VOL/x\n  vae: v\nc:\n  base_path: ${VOL}y\n  vae: v\n"
    folders = search(comfy, yaml, variables={"VOL": "/vol"})
    assert [str(path) for path in folders.by_key["vae"][1:4]] == ["/people/me/m/v", "/vol/x/v", "/voly/v"]
    assert str(search(comfy, "a:\n  base_path: $UNSET/x\n  vae: v\n").by_key["vae"][1]).endswith("$UNSET/x/v")


def test_an_unknown_key_is_a_folder_of_its_own_without_a_filter(comfy: Path):
    folders = search(comfy, f"a:\n  base_path: {comfy}\n  my_models: mine\n")
    touch(comfy / "mine/notes.txt")
    touch(comfy / "mine/sub/net.gguf")
    assert folders.names("my_models") == ["notes.txt", "sub/net.gguf"]


def test_empty_sections_count_for_nothing(comfy: Path):
    assert search(comfy, "a:\nb:\n  vae: v\n").by_key["vae"][1] == comfy / "v"


@pytest.mark.parametrize("text", ["a: [", "a: text", "- a\n- b", "a: 3"])
def test_a_yaml_that_means_nothing_is_an_error(comfy: Path, text: str):
    with pytest.raises(CatalogError, match=r"extra_model_paths\.yaml"):
        search(comfy, text)


# --- lists and names ---------------------------------------------------------------------------------


def test_names_are_the_sorted_union_filtered_by_extension(comfy: Path):
    folders = search(comfy, "a:\n  base_path: ../vol\n  vae: v\n")
    for name in ("b.safetensors", "put_vae_here", "sub/c.PTH", "q.gguf"):
        touch(comfy / "models/vae" / name)
    for name in ("a.sft", "b.safetensors"):
        touch(comfy.parent / "vol/v" / name)
    assert folders.names("vae") == ["a.sft", "b.safetensors", "sub/c.PTH"]
    assert folders.names("vae", (".gguf",)) == ["a.sft", "b.safetensors", "q.gguf", "sub/c.PTH"]


def test_links_are_followed_once(comfy: Path):
    touch(comfy.parent / "vol/a.sft")
    (comfy / "models/vae").mkdir()
    (comfy / "models/vae/vol").symlink_to(comfy.parent / "vol")
    (comfy.parent / "vol/back").symlink_to(comfy / "models/vae")
    assert "vol/a.sft" in search(comfy).names("vae")


@pytest.mark.parametrize("name", ["../../secret.sft", "/etc/passwd", "../vae/../../secret.sft"])
def test_no_name_leads_out_of_its_folder(comfy: Path, name: str):
    touch(comfy / "secret.sft")
    touch(comfy / "models/vae/x.sft")
    assert search(comfy).find("vae", name) is None


# --- other places -------------------------------------------------------------------------------------

FILE = CatalogFile(repository="Org/Repo", path="split_files/vae/x.safetensors", folder="vae", role="vae")


def test_a_file_is_found_in_a_publishers_own_sub_folder(comfy: Path):
    place = touch(comfy / "models/vae/Wan22/x.safetensors")
    assert search(comfy).locate(FILE) == place


def test_a_plain_models_folder_needs_no_comfyui(tmp_path: Path):
    place = touch(tmp_path / "vae/x.safetensors")
    assert Folders.of(Settings(models=(tmp_path,))).locate(FILE) == place


def test_repository_folders_and_snapshots_are_searched_after_comfyui(tmp_path: Path):
    cache, root = tmp_path / "hub", tmp_path / "models"
    settings = Settings(models=(root,), hub_caches=(cache,))
    snapshots = cache / "models--Org--Repo/snapshots"
    old = touch(snapshots / "aaa" / FILE.path)
    main = touch(snapshots / "bbb" / FILE.path)
    touch(cache / "models--Org--Repo/refs/main", "bbb")
    os.utime(old.parents[2])
    assert Folders.of(settings).locate(FILE) == main
    short = touch(root / "Repo" / FILE.path)
    assert Folders.of(settings).locate(FILE) == short
    full = touch(root / "Org/Repo" / FILE.path)
    assert Folders.of(settings).locate(FILE) == full
    single = touch(root / "vae/x.safetensors")
    assert Folders.of(settings).locate(FILE) == single


def test_shards_count_only_when_all_are_there(tmp_path: Path):
    file = CatalogFile(repository="Org/Repo", path="m.safetensors.index.json", role="dit", shards=2)
    folders = Folders.of(Settings(models=(tmp_path,)))
    touch(tmp_path / "Repo/m.safetensors.index.json")
    touch(tmp_path / "Repo/m-00001-of-00002.safetensors")
    assert folders.locate(file) is None
    touch(tmp_path / "Repo/m-00002-of-00002.safetensors")
    assert folders.locate(file) == tmp_path / "Repo/m.safetensors.index.json"


def test_a_folder_counts_only_when_a_file_is_in_it(tmp_path: Path):
    file = CatalogFile(repository="Org/Repo", path="google/umt5-xxl/", folder="text_encoders", role="tokenizer")
    folders = Folders.of(Settings(models=(tmp_path,)))
    touch(tmp_path / "text_encoders/umt5-xxl/.kinema/spiece.model.part")
    assert folders.locate(file) is None, "a pull that broke off"
    touch(tmp_path / "text_encoders/umt5-xxl/spiece.model")
    assert folders.locate(file) == tmp_path / "text_encoders/umt5-xxl"


def test_the_first_root_wins_over_the_second(tmp_path: Path):
    first, second = touch(tmp_path / "a/vae/x.safetensors"), touch(tmp_path / "b/vae/x.safetensors")
    settings = Settings(models=(tmp_path / "a", tmp_path / "b"))
    assert Folders.of(settings).find("vae", "x.safetensors") == first
    first.unlink()
    assert Folders.of(settings).find("vae", "x.safetensors") == second


# --- settings -------------------------------------------------------------------------------------------


def test_the_yaml_of_a_named_comfyui_is_read_with_the_callers_variables(comfy: Path):
    touch(comfy / "extra_model_paths.yaml", "a:\n  base_path: $VOL\n  vae: v\n")
    for root in (comfy, comfy / "models"):
        found = configure({"KINEMA_MODELS": str(root), "VOL": "/vol"}).settings
        assert Path("/vol/v") in Folders.of(found).by_key["vae"] and found.store == root


def test_a_further_yaml_can_be_named(tmp_path: Path):
    yaml = touch(tmp_path / "x.yaml", "a:\n  base_path: /far\n  vae: v\n")
    found = configure({"KINEMA_MODELS": str(tmp_path), "KINEMA_EXTRA_MODEL_PATHS": str(yaml)}).settings
    assert Folders.of(found).by_key["vae"][-1] == Path("/far/v")


def test_the_hubs_own_variables_are_honoured(tmp_path: Path):
    found = configure({"HF_HOME": str(tmp_path), "HF_TOKEN": "hf_x", "HF_ENDPOINT": "https://mirror/"}).settings
    assert found.hub_caches == (tmp_path / "hub",) and found.hub.endpoint == "https://mirror"
    assert found.hub.token and found.hub.token.get_secret_value() == "hf_x" and "hf_x" not in repr(found)
    assert "hf_x" not in found.model_dump_json()


def test_rented_machines_folders_are_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    volume = tmp_path / "volume"
    monkeypatch.setattr("kinema.settings.PROBES", (tmp_path / "models", volume, tmp_path / "ComfyUI"))
    touch(volume / "unet/x.gguf")
    found = configure({}).settings
    assert volume in found.models and found.store == volume and tmp_path / "models" not in found.models
