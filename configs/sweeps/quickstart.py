"""Three kinds of attention at equal parameters: softmax over shared heads, over a latent, and a recurrent state.

    make quickstart        (python train.py --sweep=configs/sweeps/quickstart.py)

About three minutes on two cores; ends in a table and runs/quickstart/report.html.
"""

from configs import quickstart
from configs.sweeps import Point

CONFIG = "configs/quickstart.py"


def variant(name: str) -> Point:
    """What one attention changes of CONFIG: its options, and the MLP that makes the parameters equal."""
    model = quickstart.get_config(f"attention={name}").model
    return {"name": name, "model.attention": model.attention, "model.mlp.width": model.mlp.width}


SWEEP = [variant("gqa"), variant("mla"), variant("lightning")]
