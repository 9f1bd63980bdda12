"""DeepSeek-V3 and R1 (arXiv 2412.19437) and Kimi-K2: a sigmoid router, corrected when experts are chosen."""

from collections.abc import Mapping
from typing import Any

from models.plan import layer_specs
from models.pretrained.families import _deepseek
from models.pretrained.settings import Settings

MODEL_TYPES = ("deepseek_v3", "kimi_k2")
ARCHITECTURE = "DeepseekV3ForCausalLM"
mapping, ignored, tensors = _deepseek.mapping, _deepseek.ignored, _deepseek.tensors


def config(hf: Settings) -> dict[str, Any]:
    """See `models.pretrained.families`."""
    layout = "interleaved" if hf.flag("rope_interleave", default=True) else "half"
    fields = _deepseek.config(hf, scale=2.5) | {"attention.rope.layout": layout}
    if "mlp.experts.count" not in fields:
        return fields
    hf.only("scoring_func", "sigmoid")
    hf.only("topk_method", "noaux_tc")
    return fields | _deepseek.groups(hf, "top2") | {
        "mlp.experts.router": "sigmoid",
        "mlp.experts.correction": True,
        "mlp.experts.renormalise": hf.flag("norm_topk_prob", default=True),
    }  # fmt: skip


def hf_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """See `models.pretrained.families`; without multi-token prediction, of which the network has no part."""
    fields, spec = _deepseek.hf_config(model), layer_specs(model)[-1]
    experts = spec["mlp"]["experts"]
    return fields | {
        "rope_interleave": spec["attention"]["rope"]["layout"] == "interleaved",
        "norm_topk_prob": experts["renormalise"],
        "n_group": experts["groups"],
        "topk_group": experts["groups_chosen"],
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
    }
