"""Records what of `cases_moe.py` needs more than `record.py` does: a patch of transformers, or a mask.

python tests/pretrained/record_moe.py
"""

import json
import pathlib
import tempfile

import cases_moe
import golden
import numpy as np
import record
import torch
from transformers.models.minimax import modeling_minimax as minimax


def first_channels_turned() -> None:
    """Makes MiniMax turn the first `rotary_dim` channels of a head, as its release does."""
    turn = minimax.apply_rotary_pos_emb

    def frequencies(config, **_):
        width = config.rotary_dim
        base = config.rope_parameters["rope_theta"]
        return 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float) / width), 1.0

    def apply(q, k, cos, sin, unsqueeze_dim=1):
        width = cos.shape[-1]
        turned = turn(q[..., :width], k[..., :width], cos, sin, unsqueeze_dim)
        return tuple(torch.cat([first, x[..., width:]], dim=-1) for first, x in zip(turned, (q, k), strict=True))

    minimax.apply_rotary_pos_emb = apply
    minimax.MiniMaxRotaryEmbedding.compute_default_rope_parameters = staticmethod(frequencies)


def padded(name: str, padding: tuple[int, ...]) -> None:
    """Writes goldens/<name>_padded.npz: logits of rows that begin with padding, and the mask of real tokens."""
    wanted = golden.load(name)
    mask = np.arange(wanted.tokens.shape[1]) >= np.array(padding)[:, None]
    with tempfile.TemporaryDirectory() as scratch:
        source = golden.folder(wanted, pathlib.Path(scratch, "source"))
        made = cases_moe.CASES[name]["made"]
        found = record.logits(source, wanted.tokens, made, attention_mask=torch.tensor(mask, dtype=torch.long))
    meta = {"config": wanted.config, "shapes": wanted.shapes, "saved": wanted.saved}
    path = golden.HERE / "goldens" / f"{name}_padded.npz"
    np.savez_compressed(path, meta=json.dumps(meta), tokens=wanted.tokens, logits=found, mask=mask)


if __name__ == "__main__":
    for case, lengths in cases_moe.PADDED.items():
        padded(case, lengths)
    first_channels_turned()
    for case, fields in cases_moe.PATCHED.items():
        record.record(case, fields)
