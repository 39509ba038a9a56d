"""Where things are on this machine, as clients find it out."""

from __future__ import annotations

from pathlib import Path

from pydantic import SecretStr

from kinema.schema.words import Frozen


class Hub(Frozen):
    """Where files come from: Hugging Face or a mirror of it, ModelScope, and who asks.

    token       of Hugging Face; token_file is where its own command line keeps one.
    """

    endpoint: str = "https://huggingface.co"
    modelscope: str = "https://modelscope.cn"
    token: SecretStr | None = None
    token_file: Path | None = None


class Settings(Frozen):
    """Where things are on this machine; clients fill it from flags, environment and configuration file.

    models            roots searched for model files, in order: models folders, or ComfyUI's own folder.
    extra_model_paths further extra_model_paths.yaml files of ComfyUI.
    folders           directories by ComfyUI's folder key, where such a file changes them; {}: those of the roots.
    hub_caches        caches of huggingface_hub, searched last.
    store             root that files are pulled to; None: the first of `models`.
    catalogs          extra catalog TOML files.
    speech_key        what a speech service asks for; sent to `speech_url`, and nowhere else.
    cache             folder of the hash cache and this machine's calibration; None keeps neither.
    """

    models: tuple[Path, ...] = ()
    extra_model_paths: tuple[Path, ...] = ()
    folders: dict[str, tuple[Path, ...]] = {}
    hub_caches: tuple[Path, ...] = ()
    store: Path | None = None
    catalogs: tuple[Path, ...] = ()
    cache: Path | None = None
    hub: Hub = Hub()
    speech_key: SecretStr | None = None
