"""A small Depth Anything model of random weights, saved as transformers saves it."""

from __future__ import annotations

from pathlib import Path

import torch


def small_depth_model(folder: Path) -> Path:
    """Write config.json and model.safetensors; return the folder."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=518, out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8,
        head_hidden_size=8,
    )  # fmt: skip
    model = DepthAnythingForDepthEstimation(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    model.save_pretrained(folder)
    return folder
