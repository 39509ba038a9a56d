"""A person's pose: read from frames, drawn as a skeleton, carried over to another body; faces and masks that follow it.

What a raw driving video needs before Animate can take it. Knows nothing of the DiT.
"""
