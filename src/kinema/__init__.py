"""Kinema: one engine for the open Wan 2.1 and 2.2 video models."""
