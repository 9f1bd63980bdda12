"""Pictures of conversions: where the energy of latents lies, and what each stage cost."""

import numpy as np
from matplotlib.figure import Figure

from evaluation import plots
from evaluation.claims import drawing
from models.conversion import Report


def picture(report: Report) -> str:
    """The text of an .svg file: each layer's share of energy in the first channels after the rotation, with the borders
    of slices, and the divergence of each stage from the original."""
    figure = Figure(figsize=(9.2, 3.6), layout="constrained", facecolor="none")
    left, right = (drawing.styled(axes) for axes in figure.subplots(1, 2))
    spectra = [np.cumsum(spectrum) for spectrum in report.spectra if spectrum]
    for layer, shares in enumerate(spectra):
        colour = plots.HEAT(0.25 + 0.75 * layer / max(1, len(spectra) - 1))
        left.plot(np.arange(1, len(shares) + 1), 100 * shares, color=colour, linewidth=1.2)
    if spectra:
        width, slices = len(spectra[0]), len(report.norm_factors[0]) if report.norm_factors else 1
        for border in range(1, slices):
            left.axvline(border * width / slices, color=plots.SOFT, linewidth=0.9, linestyle="--")
    left.set_title("energy in the first channels of a latent, %\n(a line per layer, the last one dark; slices dashed)",
                   fontsize=9.5, color=plots.SOFT)  # fmt: skip
    left.set_xlabel("channels", color=plots.SOFT)
    left.set_ylim(0, 102)
    stages = [stage for stage in report.stages if stage.name != "original"]
    costs = [max(stage.divergence, 1e-9) for stage in stages]
    right.barh([stage.name for stage in stages][::-1], costs[::-1], color=plots.SERIES[0], height=0.55)
    right.set_xscale("log")
    right.grid(False, axis="y")
    right.tick_params(axis="y", labelcolor=plots.INK, length=0)
    right.set_title(
        "KL from the original, nats per token\n(at the left edge: 1e-9 or less)", fontsize=9.5, color=plots.SOFT
    )
    return drawing.standalone(figure, "What a conversion cost")
