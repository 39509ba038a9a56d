"""Write src/kinema/catalog/layouts.toml anew: .venv/bin/python tests/store/record_layouts.py; then read the difference.

Structures are counted on the models themselves, built without memory: published ones from the layouts beside
tests/formats, the others, whose widths alone differ, from the facts that plans are tested with.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from checkpoints import manifest, write_sparse
from kinema.catalog.table import load_catalog
from kinema.schema import Component, FileFacts
from kinema.weights.detect import inspect
from kinema.weights.structure import build
from plan.world import files_of

LAYOUTS = Path(__file__).parents[2] / "src/kinema/catalog/layouts.toml"
HEAD = """# Structure of the parts that models share, and of each DiT that differs in it, as read from 16-bit files.
# Made by tests/store/record_layouts.py; do not edit it by hand. blocks: how many, parameters of each.
"""

PUBLISHED = {
    "umt5-xxl": "umt5_xxl_encoder_official", "clip-vit-h": "clip_vision_h_transformers",
    "wav2vec2": "wav2vec2_large_transformers", "wan2.1-vae": "wan2.1_vae", "wan2.2-vae": "wan2.2_vae",
    "flux-ae": "flux1_ae", "t5-xxl": "t5xxl_encoder_transformers", "clip-l": "clip_l_transformers",
    "wan2.1-t2v-1.3b": "wan2.1_t2v_1.3B", "wan2.1-t2v-14b": "wan2.1_t2v_14B", "wan2.1-i2v-14b-480p": "wan2.1_i2v_14B",
    "wan2.1-flf2v-14b": "wan2.1_flf2v_14B", "wan2.2-i2v-a14b": "wan2.2_i2v_a14B", "wan2.2-ti2v-5b": "wan2.2_ti2v_5B",
    "wan2.2-s2v-14b": "wan2.2_s2v_14B", "wan2.2-animate-14b": "wan2.2_animate_14B",
    "wan2.1-vace-1.3b": "wan2.1_vace_1.3B", "wan2.1-vace-14b": "wan2.1_vace_14B",
    "wan2.1-fun-inp-1.3b": "wan2.1_fun_inp_1.3B", "wan2.1-fun-control-14b": "wan2.1_fun_control_14B",
    "wan2.1-fun-camera-14b": "wan2.1_fun_camera_14B", "wan2.2-fun-control-a14b": "wan2.2_fun_control_a14B",
    "wan2.2-fun-camera-a14b": "wan2.2_fun_camera_a14B", "flux.1-dev": "flux1_dev", "flux.1-schnell": "flux1_schnell",
}  # fmt: skip
"""Part or model -> its layout in tests/formats/manifests."""

SIGLIP = {"image_size": 384, "patch_size": 14, "dim": 1152, "mlp_dim": 4304, "num_layers": 27}
REDUX = {"image_dim": 1152, "hidden_dim": 12288, "text_dim": 4096}


def shapes_of(component: Component, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in build(component, config).state_dict().items()}


def layouts() -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Yield the tensors of each part and of the DiT of each model, those of an optional adapter apart."""
    for name, layout in PUBLISHED.items():
        yield name, manifest(layout)
    yield "sigclip-so400m", {f"vision_model.{name}": shape for name, shape in shapes_of("siglip", SIGLIP).items()}
    yield "flux.1-redux-dev", shapes_of("redux", REDUX)
    yield "wan2.1-speedcontrol-1.3b", shapes_of("motion_controller", {"freq_dim": 256, "dim": 1536})
    for name, entry in load_catalog().items():
        if name == "demo" or entry.dit_of:
            continue
        facts = files_of(entry)["dit"]
        config = {key: value for key, value in facts.config.items() if key != "head_dim"}
        optional = sorted(field for field, wanted in entry.structure.items() if wanted == "optional")
        bare = {key: value for key, value in config.items() if key not in optional}
        if name not in PUBLISHED:
            yield name, shapes_of(facts.component, config)
        if optional:
            yield f"{name} without {', '.join(optional)}", shapes_of(facts.component, bare)


def text(all_shapes: dict[str, dict[str, tuple[int, ...]]]) -> str:
    """Return the file: one row for each structure."""
    rows, seen = [HEAD], set()
    with tempfile.TemporaryDirectory() as folder:
        for name, shapes in all_shapes.items():
            facts = inspect(write_sparse(Path(folder) / "model.safetensors", shapes))
            others = sum(math.prod(shape) for shape in shapes.values() if len(shape) != 2)
            structure = (facts.component, json.dumps(facts.config))
            if structure not in seen:
                seen.add(structure)
                rows.append(_row(name, facts, others))
    return "\n".join(rows)


def _row(name: str, facts: FileFacts, others: int) -> str:
    blocks = [[len(list(group)), size] for size, group in groupby(facts.blocks)]
    values = {
        "component": facts.component, "parameters": facts.parameters, "tensors": facts.tensors,
        "float32_parameters": facts.float32_parameters, "matrix_parameters": facts.matrix_parameters,
        "other_parameters": others, "blocks": blocks,
        "config": facts.config,
    }  # fmt: skip
    return f'["{name}"]\n' + "".join(f"{key} = {_toml(value)}\n" for key, value in values.items())


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


if __name__ == "__main__":
    LAYOUTS.write_text(text(dict(layouts())), "utf-8")
