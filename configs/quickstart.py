"""A small language model on the interpreter's own library: about a minute on two cores.

    make quickstart                                              gqa, mla and lightning in turn, and one report
    python train.py --config=configs/quickstart.py:attention=mla one of them

Each variant has the same number of parameters as the others: what its attention saves goes into its MLP.

EXPECTED
"""

import ml_collections

from configs import attention, base
from configs.command_line import arguments
from configs.sizes import resize

# Hidden widths that make the parameters those of gqa at 352; `models.budget.match` found them, a test holds them.
MLP_WIDTHS = {"gqa": 352, "lightning": 267, "mha": 309, "mla": 304, "mqa": 373, "sliding": 352}


def get_config(text: str = "") -> ml_collections.ConfigDict:
    """The config of one variant; `smoke` makes it a run of seconds that proves the flow and nothing else."""
    args = arguments(text, attention="gqa", smoke=False)
    config = base.get_config()
    config.name = f"quickstart-{args.attention}"
    config.model.width = 128
    config.model.depth = 4
    config.model.max_length = 256
    config.model.attention = resize(attention.get(args.attention), heads=4, head_dim=32)
    config.model.mlp.width = MLP_WIDTHS.get(args.attention, 352)
    config.data.length = 256
    config.data.batch_size = 8
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 20
    config.train.steps = 200
    config.checkpoint.every = 0
    config.eval.limit = 48.0
    config.eval.batch_size = 16
    config.eval.sample_tokens = 160
    if args.smoke:
        config.data.max_files = 24
        config.optimizer.warmup_steps = 2
        config.train.steps = 4
        config.eval.limit = 4.0
        config.eval.sample_tokens = 16
    return config
