"""Videos made clip by clip, each clip conditioned on the frames of those before.

loop    the loop itself, and what a task has to bring (`ClipTask`).
kept    finished clips on disk, so that a long job loses nothing.
tasks   which task a plan is; speech: that of speech to video.
"""
