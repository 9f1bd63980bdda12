"""A small Llama, its tokenizers and the requests it is asked, alike for the peer that was recorded and for ours."""

import json
import pathlib
import sys
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "pretrained"))
from weights import weight  # noqa: E402

LENGTH = 64
WIDTH, DEPTH, HEADS, KV_HEADS, MLP = 32, 1, 4, 2, 48
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VARIANTS = ("plain", "bos")  # Whether the tokenizer puts its bos before a text, as Llama's does, or not, as GPT-2's.

_LONG = "The river runs down to the sea and the sea gives it back as rain. " * 12
CHOICES = (
    ("Question: What do bees make?\nAnswer:", (" honey", " milk", " paper and glue", " a river of glass")),
    ("Question: What falls from clouds?\nAnswer: ", ("rain", "stones", "a long song of the old town", "z")),
    ("The following are questions.\n\nWhich one?\nA. x\nB. y\nC. z\nD. w\nAnswer:", (" A", " B", " C", " D")),
    (_LONG, (" The end.", " It rains on the hills, and all of it runs down again.")),
    ("", ("Without any context.", "the", " one")),
    ("One request alone", (" stands here.",)),
    ("Question: why?\nAnswer:", ("h", "h!", "ho")),  # The first is what it says itself.
    ("a  \n ", ("b", "b", "c d e f g h i j k")),
)
TEXTS = ("Short.", _LONG, "Numbers: 1, 2, 3; words, words, words.", _LONG[:300])
CONTINUED = (
    ("Once upon a time", {"until": ["\n\n"], "max_gen_toks": 20, "do_sample": False}),
    ("Question: why?\nAnswer:", {"until": ["-", "ivg"], "max_gen_toks": 24}),
    (_LONG, {"until": ["\n\n"], "max_gen_toks": 20, "do_sample": False}),
    ("x", {"until": [], "max_gen_toks": 40, "temperature": 0.0}),
    ("def f(", {"until": ["wn", "ords"], "max_gen_toks": 24}),
)


def pairs() -> list[tuple[str, str]]:
    """(context, continuation) of every log-likelihood that is asked for."""
    return [(context, ending) for context, endings in CHOICES for ending in endings]


def tokenizer_json(variant: str) -> str:
    """The content of tokenizer.json."""
    content = json.loads((HERE / "tokenizer.json").read_text(encoding="utf-8"))
    if variant == "bos":
        bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
        number = next(token["id"] for token in content["added_tokens"] if token["content"] == BOS)
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, bos, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [number], "tokens": [BOS]}},
        }
    return json.dumps(content)


def write(folder: pathlib.Path, variant: str) -> pathlib.Path:
    """The whole Hugging Face folder."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    text = tokenizer_json(variant)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    specials = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **specials})
    )
    content = json.loads(text)
    size = len(content["model"]["vocab"]) + sum(
        token["content"] not in content["model"]["vocab"] for token in content["added_tokens"]
    )
    (folder / "config.json").write_text(json.dumps(config(size)))
    save_file(tensors(size), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def config(vocab_size: int) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab_size, "hidden_size": WIDTH,
        "intermediate_size": MLP, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "max_position_embeddings": LENGTH, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
        "torch_dtype": "float32",
    }  # fmt: skip


def tensors(vocab_size: int) -> dict[str, np.ndarray]:
    """Weights by name; the head is large, so that the model has opinions."""
    head = WIDTH // HEADS
    shapes = {"model.embed_tokens.weight": (vocab_size, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(DEPTH):
        inside = {
            "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
            "self_attn.q_proj": (HEADS * head, WIDTH), "self_attn.k_proj": (KV_HEADS * head, WIDTH),
            "self_attn.v_proj": (KV_HEADS * head, WIDTH), "self_attn.o_proj": (WIDTH, HEADS * head),
            "mlp.gate_proj": (MLP, WIDTH), "mlp.up_proj": (MLP, WIDTH), "mlp.down_proj": (WIDTH, MLP),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in inside.items()}
    made = {name: weight(name, shape) for name, shape in shapes.items()}
    return made | {"lm_head.weight": 2 * weight("lm_head.weight", (vocab_size, WIDTH))}
