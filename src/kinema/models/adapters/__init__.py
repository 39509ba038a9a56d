"""Adapters of the Wan DiT, one a file: what VACE, camera, reference image and others add to its forward pass."""
