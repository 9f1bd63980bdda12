"""The picture of a mask."""

from typing import Any

import numpy as np

from kernels.tokens import Tokens


def draw(mask: Any, tokens: Tokens, *, block: int = 0, head: int = 0) -> Any:
    """A matplotlib figure: dark where row t may attend to column s; `block` outlines skipped and full blocks."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    allowed = np.asarray(mask.allowed(tokens, tokens))[0]
    allowed = allowed[min(head, len(allowed) - 1)]
    figure = Figure(figsize=(4.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(allowed, cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")
    if block:
        status = np.asarray(mask.classify(tokens, tokens, block, block))[0]
        status = status[min(head, len(status) - 1)]
        colours = {0: "0.75", 1: "tab:orange", 2: "tab:green"}
        for (i, j), kind in np.ndenumerate(status):
            corner = (j * block - 0.5, i * block - 0.5)
            axes.add_patch(Rectangle(corner, block, block, fill=False, lw=1.2, ec=colours[int(kind)], zorder=2 + kind))
        axes.set_xlabel("key    (blocks: grey skipped, orange partial, green full)")
    else:
        axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.set_title(f"{mask}\n{allowed.mean():.1%} of pairs", fontsize=9)
    return figure
