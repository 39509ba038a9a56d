"""Predicted peaks against measured ones on a CPU, stage by stage, in a fresh process, with a model of over 1 GB.

.venv/bin/python bench/memory.py --model t2v --size 640x480 --frames 5

Writes random weights (DiTs of published width with a few layers, autoencoders of published or smaller width) to a
temporary folder, runs the engine, and samples anonymous memory above what it was after the imports. Mapped pages are in
neither number.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

import tiny_flux  # noqa: E402
import tiny_world  # noqa: E402
from checkpoints import TINY, TINY_VAE22  # noqa: E402
from kinema.engine import Engine  # noqa: E402
from kinema.planning.memory import CPU_BASE  # noqa: E402
from kinema.schema import Component, Progress, Request, Settings  # noqa: E402
from kinema.weights.structure import build  # noqa: E402

WIDTHS = {"1.3B": {"dim": 1536, "ffn_dim": 8960}, "5B": {"dim": 3072, "ffn_dim": 14336},
          "14B": {"dim": 5120, "ffn_dim": 13824}}  # fmt: skip
FLUX = {"dim": 3072, "mlp_dim": 12288, "num_double": 2, "num_single": 3, "text_dim": tiny_flux.TEXT_DIM,
        "vector_dim": tiny_flux.VECTOR_DIM}  # fmt: skip

MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "t2v": ("tiny-t2v", "t2v", {**tiny_world.DITS["t2v"], "freq_dim": 256}, TINY["vae"]),
    "i2v": ("tiny-clip", "clip", {**tiny_world.DITS["clip"], "freq_dim": 256}, TINY["vae"]),
    "ti2v": ("tiny-ti2v", "ti2v", {**tiny_world.DITS["ti2v"], "freq_dim": 256}, TINY_VAE22),
    "flux": ("tiny-flux", "flux_dev", FLUX, {"dim": 128}),
}
"""By name: the model of the tests whose files are made large, its DiT's file, and what the two large parts are like."""


def anonymous() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def write(path: Path, component: Component, config: dict[str, Any], dtype: torch.dtype) -> int:
    """Write a model of random weights; return its bytes. The same million numbers again and again: drawing is slow."""
    drawn, state = torch.randn(2**20), {}
    for name, tensor in build(component, config).state_dict().items():
        count, fan = tensor.numel(), tensor.shape[1:].numel() if tensor.ndim > 1 else 1
        plain = tensor.ndim < 2 or name.endswith("gamma")
        flat = torch.ones(count) if plain else drawn.repeat(count // len(drawn) + 1)[:count] / fan**0.5
        state[name] = flat.view(tensor.shape).to(dtype)
    save_file(state, path)
    return path.stat().st_size


def world(root: Path, options: argparse.Namespace) -> None:
    """Write the small world of the tests, and over it the large DiT and autoencoder."""
    _, file, dit, vae = MODELS[options.model]
    flux = options.model == "flux"
    (tiny_flux.build_flux if flux else tiny_world.build)(root)
    wide = {} if flux else {**WIDTHS[options.width], "num_layers": options.layers}
    size = write(
        root / f"diffusion_models/{file}.safetensors", "flux_dit" if flux else "dit", {**dit, **wide}, torch.bfloat16
    )
    assert size >= 1e9, f"{size / 1e9:.2f} GB: more layers"
    base = {} if flux else {"dim": options.vae_dim, "dec_dim": options.vae_dim}
    name = "tiny_ae" if flux else "tiny_vae22" if options.model == "ti2v" else "tiny_vae"
    write(root / f"vae/{name}.safetensors", "flux_vae" if flux else "vae", {**vae, **base}, torch.float32)
    catalog = root / ("flux.toml" if flux else "tiny.toml")
    text = catalog.read_text().replace("dim = 128", f"dim = {wide.get('dim', 3072)}")
    catalog.write_text(text.replace("num_layers = 2", f"num_layers = {wide.get('num_layers')}"))


def measure(settings: Settings, fields: dict[str, Any], held: int) -> dict[str, tuple[int, int]]:
    """Return (predicted, measured) bytes above the base by stage. held: bytes of a tensor that nobody planned."""
    peaks: dict[str, int] = {}
    now, done = ["start"], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peaks[now[0]] = max(peaks.get(now[0], 0), anonymous())
            time.sleep(0.002)

    base = anonymous()
    extra = torch.ones(held, dtype=torch.uint8)
    with Engine(settings) as engine:
        plan = engine.plan(Request(**fields))
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        for event in engine.run(plan):
            if isinstance(event, Progress) and event.done == 0:
                now[0] = event.stage
        done.set()
        watcher.join()
    del extra
    return {cost.stage: (cost.peak_bytes - CPU_BASE, peaks.get(cost.stage, base) - base) for cost in plan.costs}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=MODELS, default="t2v")
    parser.add_argument("--width", choices=WIDTHS, default="14B", help="of Wan's DiT")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vae-dim", type=int, default=96, help="base width of Wan's VAE")
    parser.add_argument("--size", default="320x320")
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--swap", type=int, help="blocks that are streamed")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--hold", type=int, default=0, help="MB of a tensor that nobody planned: a fault, for the test")
    parser.add_argument("--json", action="store_true", help="print {stage: [predicted, measured]} in bytes")
    parser.add_argument("--write", type=Path, help="only write the files there: in a process of its own, which leaves")
    parser.add_argument("--folder", type=Path, help="where they were written before")
    options = parser.parse_args()
    if options.write:
        world(options.write, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = options.folder or Path(folder)
        if options.folder is None:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--write", folder], check=True)
        flux, name = options.model == "flux", MODELS[options.model][0]
        fields = {
            "model": name, "prompt": "a cat walks on grass", "seed": 1, "steps": 1, "device": "cpu",
            "guidance": options.guidance, "size": options.size, "dtype": options.dtype,
            "blocks_to_swap": options.swap, "overwrite": True, "save": root / ("x.png" if flux else "x.mp4"),
        }  # fmt: skip
        if not flux:
            fields["frames"] = options.frames
        if options.model in ("i2v", "ti2v"):
            fields["first"] = tiny_world.picture(root / "first.png")
        settings = Settings(models=(root,), catalogs=(root / ("flux.toml" if flux else "tiny.toml"),))
        found = measure(settings, fields, options.hold * 10**6)
    if options.json:
        print(json.dumps(found))
        return
    for stage, (predicted, measured) in found.items():
        ratio = predicted / measured if measured else float("nan")
        print(f"{stage:<14} predicted {predicted / 1e6:8.0f} MB  measured {measured / 1e6:8.0f} MB  {ratio:.2f}")


if __name__ == "__main__":
    main()
