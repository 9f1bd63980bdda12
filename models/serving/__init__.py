"""Serving: many requests at once, their caches in pages, prompts read on one mesh and continued on another."""

from models.sampling import Sampling
from models.serving.engine import Engine, Request
from models.serving.handover import Prefill, hand_over, slice_rows
from models.serving.kept import kept
from models.serving.pages import Pages

__all__ = ["Engine", "Pages", "Prefill", "Request", "Sampling", "hand_over", "kept", "slice_rows"]
