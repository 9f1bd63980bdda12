"""Pretrained networks in and out: Hugging Face folders of safetensors. Which architectures, and how to add one, is in
`docs/pretrained.md`."""

from models.pretrained.errors import PretrainedError
from models.pretrained.loading import Pretrained, load_pretrained
from models.pretrained.saving import save_pretrained

__all__ = ["Pretrained", "PretrainedError", "load_pretrained", "save_pretrained"]
