"""Every attention preset at equal parameters, three seeds each: which one learns most from the same tokens?

    python train.py --sweep=configs/sweeps/attention.py

18 runs of 500 steps, about a minute and a half each on two cores; ends in runs/attention/report.html, whose table over
seeds is the one to read. What an attention saves goes into its MLP (`models.budget.equal`; a test holds it to 1 %).
"""

from configs import quickstart
from configs.sweeps import Point, param, product

CONFIG = "configs/quickstart.py"


def variant(name: str) -> Point:
    """What one attention changes of CONFIG."""
    model = quickstart.get_config(f"attention={name}").model
    return {"name": name, "model.attention": model.attention, "model.mlp.width": model.mlp.width, "train.steps": 500}


SWEEP = product([variant(name) for name in quickstart.MLP_WIDTHS], param("seed", 0, 1, 2))
