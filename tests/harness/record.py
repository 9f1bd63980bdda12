"""Records what lm-evaluation-harness's own model class (HFLM) answers to the requests of `peer.py`.

    python tests/harness/record.py

Needs torch, transformers, accelerate and lm-eval; writes golden.json, and tokenizer.json where there is none. With a
tokenizer that puts bos before a text, HFLM rolls over two of them and scores the second, unless it is told not to (as
here).
"""

import json
import pathlib
import tempfile

import lm_eval
import peer
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


def train_tokenizer() -> None:
    """A byte-level BPE of a few merges."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[peer.BOS, peer.EOS, peer.PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([*peer.TEXTS, *(context for context, _ in peer.CHOICES)], trainer)
    (peer.HERE / "tokenizer.json").write_text(json.dumps(json.loads(made.to_str())), encoding="utf-8")


def ask(lm: HFLM, kind: str, arguments: list[tuple]) -> list:
    """The answers of one kind."""
    return getattr(lm, kind)([Instance(kind, {}, given, index) for index, given in enumerate(arguments)])


def record(variant: str) -> dict:
    """Every answer, of a tokenizer with or without bos."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = peer.write(pathlib.Path(scratch), variant)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        given = {"tokenizer": tokenizer, "batch_size": 3, "max_length": peer.LENGTH, "device": "cpu"}
        lm = HFLM(pretrained=model.eval(), **given)
        bare = HFLM(pretrained=model, add_bos_token=False, **given)
        rolled = [(text,) for text in peer.TEXTS]
        scored = ask(lm, "loglikelihood", peer.pairs())
        found = {
            "loglikelihood": [[float(value), bool(greedy)] for value, greedy in scored],
            "loglikelihood_rolling": [float(value) for value in ask(bare, "loglikelihood_rolling", rolled)],
            "generate_until": ask(lm, "generate_until", [(text, dict(options)) for text, options in peer.CONTINUED]),
        }
    return found


def main() -> None:
    """Writes golden.json."""
    if not (peer.HERE / "tokenizer.json").exists():
        train_tokenizer()
    versions = {"lm_eval": lm_eval.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    found = {"versions": versions, **{variant: record(variant) for variant in peer.VARIANTS}}
    (peer.HERE / "golden.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
