"""Attention on TPU (Pallas, Mosaic): the kernel that `kernels.attention.fused` drives there."""

from kernels.attention.pallas_tpu_backward import backward
from kernels.attention.pallas_tpu_forward import forward
from kernels.attention.pallas_tpu_sizes import chosen, padded

__all__ = ["backward", "chosen", "forward", "padded"]
