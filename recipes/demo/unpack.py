"""Turn the model that ships back into checkpoints, to go on training where runs/demo is gone.

    python recipes/demo/unpack.py
    python recipes/demo/make_latents.py
    python recipes/demo/train_dit.py --steps 12000

The weights come back rounded to float16; the optimisers' state does not come back, and starts anew.
"""

from __future__ import annotations

import json

import loop
from export import ASSETS
from make_latents import STATISTICS, VAE
from model import CHECKPOINT
from safetensors import safe_open
from torch import Tensor
from train_vae import RUNS


def parts(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Float32 tensors and metadata of a shipped file; the tokenizer's bytes stay bytes."""
    with safe_open(ASSETS / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return {key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}, file.metadata()


def main() -> None:
    for path in (VAE, CHECKPOINT):
        if path.exists():
            raise SystemExit(
                f"{path} exists: training goes on from there by itself; remove it to start from the assets"
            )
    RUNS.mkdir(parents=True, exist_ok=True)
    vae, facts = parts("vae")
    loop.save(VAE, {"model": vae})
    statistics = {"mean": json.loads(facts["latent_mean"]), "std": json.loads(facts["latent_std"])}
    STATISTICS.write_text(json.dumps(statistics))
    text, _ = parts("text_encoder")
    (RUNS / "spiece.model").write_bytes(text.pop("spiece_model").numpy().tobytes())
    dit, facts = parts("dit")
    model = {f"text.{key}": t for key, t in text.items()} | {f"dit.{key}": t for key, t in dit.items()}
    loop.save(CHECKPOINT, {"model": model, "average": model, "step": int(facts["steps"]), "optimisers": []})
    print(f"{RUNS} holds the shipped model, step {facts['steps']}")


if __name__ == "__main__":
    main()
