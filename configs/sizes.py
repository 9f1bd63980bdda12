"""One preset in several sizes."""

import ml_collections

_WIDTHS = ("value_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank", "q_lora_rank")


def resize(options: ml_collections.ConfigDict, *, heads: int, head_dim: int) -> ml_collections.ConfigDict:
    """A copy of attention options with so many heads of such a width.

    Key/value heads keep their proportion to the heads (one stays one, several stay several), ranks and the parts of a
    latent head theirs to the width of a head.
    """
    options = ml_collections.ConfigDict(options.copy_and_resolve_references())
    before = options["qk_nope_head_dim"] if "qk_nope_head_dim" in options else options["head_dim"]
    if "kv_heads" in options and options.kv_heads > 1:
        options.kv_heads = max(2, options.kv_heads * heads // options.heads)
    for name in _WIDTHS:
        if name in options:
            options[name] = options[name] * head_dim // before
    if "head_dim" in options:
        options.head_dim = head_dim
    options.heads = heads
    return options
