"""Predicted peaks against measured ones on a CPU, stage by stage, in a fresh process, with a model of over 1 GB.

.venv/bin/python bench/memory.py --size 320x320 --frames 21

Writes random weights of true widths (1.3B's DiT with fewer layers, the full 2.1 VAE, a small text encoder) to a
temporary folder, runs the engine, and samples anonymous memory above what it was after the imports. Mapped pages are in
neither number.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

from checkpoints import TINY  # noqa: E402
from kinema.engine import Engine  # noqa: E402
from kinema.planning.memory import CPU_BASE  # noqa: E402
from kinema.schema import Progress, Request, Settings  # noqa: E402
from kinema.weights.structure import MODELS  # noqa: E402
from tiny_world import ROW, spiece_model  # noqa: E402

DIT = {**TINY["dit"], "dim": 1536, "ffn_dim": 8960, "in_channels": 16, "text_dim": 1024, "freq_dim": 256,
       "has_clip_tokens": False, "num_clip_positions": 0}  # fmt: skip
TEXT = {**TINY["text_encoder"], "dim": 1024, "dim_attn": 1024, "num_heads": 16, "ffn_dim": 2816, "num_layers": 8}
VAE = {**TINY["vae"], "dim": 96, "dec_dim": 96}


def anonymous() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def write(
    path: Path, component: str, config: dict, dtype: torch.dtype, more: dict[str, torch.Tensor] | None = None
) -> None:
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    with torch.device("meta"):
        module = MODELS[component].module(MODELS[component].arguments(**arguments))  # type: ignore[index]
    state = {}
    for name, tensor in module.state_dict().items():
        fan = tensor.shape[1:].numel() if tensor.ndim > 1 else 1
        plain = tensor.ndim < 2 or name.endswith("gamma")
        state[name] = (torch.ones(tensor.shape) if plain else torch.randn(tensor.shape) / fan**0.5).to(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**state, **(more or {})}, path)


def world(root: Path, layers: int) -> Settings:
    dit = {**DIT, "num_layers": layers}
    write(root / "diffusion_models/t2v.safetensors", "dit", dit, torch.bfloat16)
    write(root / "vae/tiny_vae.safetensors", "vae", VAE, torch.float32)
    spiece = torch.frombuffer(bytearray(spiece_model()), dtype=torch.uint8)
    write(root / "text_encoders/tiny_umt5.safetensors", "text_encoder", TEXT, torch.bfloat16, {"spiece_model": spiece})
    row = ROW.format(
        name="large", kind="t2v", more="", vae="wan2.1", in_channels=16, out_channels=16, clip="false", positions=0,
        adapters="",
    )  # fmt: skip
    row = row.replace("structure.dim = 128", "structure.dim = 1536").replace("num_layers = 2", f"num_layers = {layers}")
    (root / "large.toml").write_text(
        '[shared]\ntext_encoder = ["text_encoders/tiny_umt5.safetensors"]\nvae21 = ["vae/tiny_vae.safetensors"]\n' + row
    )
    return Settings(models=(root,), catalogs=(root / "large.toml",))


def measure(settings: Settings, request: Request) -> dict[str, tuple[int, int]]:
    """Return (predicted, measured) bytes above the base by stage."""
    peaks: dict[str, int] = {}
    now, done = ["start"], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peaks[now[0]] = max(peaks.get(now[0], 0), anonymous())
            time.sleep(0.002)

    with Engine(settings) as engine:
        plan = engine.plan(request)
        base = anonymous()
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        for event in engine.run(plan):
            if isinstance(event, Progress) and event.done == 0:
                now[0] = event.stage
        done.set()
        watcher.join()
    return {cost.stage: (cost.peak_bytes - CPU_BASE, peaks.get(cost.stage, 0) - base) for cost in plan.costs}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="320x320")
    parser.add_argument("--frames", type=int, default=21)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--write", type=Path, help="only write the files there: in a process of its own, which leaves")
    options = parser.parse_args()
    if options.write:
        world(options.write, options.layers)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--write", folder, "--layers", str(options.layers)]
        subprocess.run(command, check=True)
        settings = Settings(models=(Path(folder),), catalogs=(Path(folder) / "large.toml",))
        request = Request(
            model="large", prompt="a cat walks on grass", seed=1, steps=1, guidance=1.0, device="cpu",
            size=options.size, frames=options.frames, dtype=options.dtype, save=Path(folder) / "x.mp4",
        )  # fmt: skip
        for stage, (predicted, measured) in measure(settings, request).items():
            ratio = predicted / measured if measured else float("nan")
            print(
                f"{stage:<14} predicted {predicted / 1e6:8.0f} MB  measured {measured / 1e6:8.0f} MB  {ratio:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
