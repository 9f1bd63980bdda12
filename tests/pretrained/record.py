"""Records what transformers makes of the cases, and checks that what this project exports loads there too.

    python tests/pretrained/record.py [case ...]              records goldens/<case>.npz
    python tests/pretrained/record.py --check-export [case]   export -> transformers gives the golden's logits

Needs torch and transformers, which nothing else here does. The weights are `weights.weight` of each tensor's name, as
transformers itself names it in the files it writes.
"""

import argparse
import json
import pathlib
import re
import sys
import tempfile

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent.parent))
import golden  # noqa: E402
import weights  # noqa: E402

ROWS = 2
NONE = r"(?!)"  # Matches no name.


def logits(
    folder: pathlib.Path, tokens: np.ndarray, made: str = NONE, dtype: torch.dtype = torch.float32, **more: torch.Tensor
) -> np.ndarray:
    """Logits of the network in a folder, computed in `dtype`; the loader must find every tensor and nothing else.

    Buffers whose names match `made` it makes itself; `more` goes to the network too.
    """
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = [name for name in report.get(kind) or () if not re.fullmatch(made, str(name))]
        if found:
            raise SystemExit(f"{folder}: {kind} {found}")
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens, dtype=torch.long), **more).logits.float().numpy()


def record(name: str, case: dict) -> None:
    """Writes one golden."""
    made = case.get("made", NONE)
    with tempfile.TemporaryDirectory() as scratch:
        here, there = pathlib.Path(scratch, "here"), pathlib.Path(scratch, "there")
        here.mkdir()
        (here / "config.json").write_text(json.dumps(case["config"]))
        config = transformers.AutoConfig.from_pretrained(here)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(there)
        with safe_open(there / "model.safetensors", "np") as stored:
            shapes = {tensor: tuple(stored.get_slice(tensor).get_shape()) for tensor in stored.keys()}
        shapes = {tensor: shape for tensor, shape in shapes.items() if not re.fullmatch(made, tensor)}
        saved = json.loads((there / "config.json").read_text())
        save_file({tensor: weights.weight(tensor, shape) for tensor, shape in shapes.items()},
                  here / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
        tokens = weights.tokens(case["config"]["vocab_size"], ROWS, case["length"])
        found = logits(here, tokens, made)
        narrow = logits(here, tokens, made, torch.bfloat16) - found
    apart = float(np.sqrt((narrow**2).mean() / (found**2).mean()))
    meta = {"config": case["config"], "shapes": shapes, "saved": saved, "transformers": transformers.__version__,
            "bfloat16": apart}  # fmt: skip
    (HERE / "goldens").mkdir(exist_ok=True)
    np.savez_compressed(HERE / "goldens" / f"{name}.npz", meta=json.dumps(meta), tokens=tokens, logits=found)
    print(f"{name}: {len(shapes)} tensors, logits of size {np.abs(found).max():.3g}, in bfloat16 {apart:.2g} apart")


def check_export(name: str) -> float:
    """The largest difference between the golden's logits and those of transformers on what this project writes."""
    from models import load_pretrained, save_pretrained

    wanted = golden.load(name)
    with tempfile.TemporaryDirectory() as scratch:
        source, target = golden.folder(wanted, pathlib.Path(scratch, "source")), pathlib.Path(scratch, "target")
        loaded = load_pretrained(source)
        save_pretrained(loaded.model, loaded.config, target, max_shard_size=40_000, family=loaded.hf["model_type"])
        return float(
            np.abs(logits(target, wanted.tokens, golden.cases()[name].get("made", NONE)) - wanted.logits).max()
        )


def main() -> int:
    """The command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("cases", nargs="*")
    flags.add_argument("--check-export", action="store_true")
    options = flags.parse_args()
    known = golden.cases()
    worst = 0.0
    for name in options.cases or known:
        if options.check_export:
            apart = check_export(name)
            worst = max(worst, apart)
            print(f"{name}: exported, loaded by transformers: logits {apart:.2g} apart")
        else:
            record(name, known[name])
    return int(worst > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
