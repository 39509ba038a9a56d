"""Weights that are held in fewer bits than they are computed in: how files store them, and the layers that use them."""
