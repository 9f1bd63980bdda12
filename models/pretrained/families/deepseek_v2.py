"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434): a softmax router, greedy or limited to the best groups of experts."""

from collections.abc import Mapping
from typing import Any

from models.plan import layer_specs
from models.pretrained.families import _deepseek
from models.pretrained.settings import Settings

MODEL_TYPES = ("deepseek_v2",)
ARCHITECTURE = "DeepseekV2ForCausalLM"
mapping, ignored, tensors = _deepseek.mapping, _deepseek.ignored, _deepseek.tensors


def config(hf: Settings) -> dict[str, Any]:
    """See `models.pretrained.families`."""
    hf.only("mlp_bias", False)
    fields = _deepseek.config(hf, scale=1.0) | {"attention.rope.layout": "interleaved"}
    if "mlp.experts.count" not in fields:
        return fields
    hf.only("scoring_func", "softmax")
    hf.only("norm_topk_prob", False)  # Said to be true, one library renormalises and another does not.
    fields |= {"mlp.experts.router": "softmax", "mlp.experts.renormalise": False}
    if hf.only("topk_method", "greedy", "group_limited_greedy") == "greedy":
        return fields
    return fields | _deepseek.groups(hf, "max")


def hf_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """See `models.pretrained.families`."""
    fields, experts = _deepseek.hf_config(model), layer_specs(model)[-1]["mlp"]["experts"]
    fields |= {"mlp_bias": False, "norm_topk_prob": False, "topk_method": "greedy"}
    if experts["count"] and experts["groups"] > 1:
        chosen = {"n_group": experts["groups"], "topk_group": experts["groups_chosen"]}
        fields |= {"topk_method": "group_limited_greedy", **chosen}
    return fields
