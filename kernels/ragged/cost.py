"""What one ragged layer costs, from its shapes alone."""


def flops(rows: int, inputs: int, outputs: int, *, backward: bool = False) -> int:
    """Floating-point operations (a multiply-add is two) of the product; `backward` counts the two of the gradients."""
    return 2 * rows * inputs * outputs * (2 if backward else 1)


def bytes(
    rows: int,
    groups: int,
    inputs: int,
    outputs: int,
    *,
    itemsize: int = 4,
    weight_itemsize: int = 4,
    backward: bool = False,
) -> int:
    """Bytes that must cross memory once, every group having rows: forward reads x and w and writes y; backward reads
    x, w and dy and writes dx and dw."""
    activations = rows * (inputs + outputs) * itemsize
    weights = groups * inputs * outputs * weight_itemsize
    if backward:
        return activations + rows * inputs * itemsize + 2 * weights
    return activations + weights
