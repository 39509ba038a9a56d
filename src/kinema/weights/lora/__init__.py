"""LoRA and its kin: files of every spelling matched to official parameters, applied beside weights or fused."""
