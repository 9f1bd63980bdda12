"""A tiny model, tokenizer and pipeline with the contracts the evaluation reads, and a NumPy twin of the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


@dataclasses.dataclass
class Output:
    logits: jax.Array
    caches: tuple = ()
    aux: dict = dataclasses.field(default_factory=dict)


jax.tree_util.register_dataclass(Output, data_fields=["logits", "caches", "aux"], meta_fields=[])


class MeanModel(nnx.Module):
    """Causal: the logits after a token are read off the mean of the embeddings up to it, weighted towards the last."""

    def __init__(self, vocab_size: int, width: int = 8, seed: int = 0, scale: float = 1.0) -> None:
        generator = np.random.default_rng(seed)
        self.embedding = nnx.Param(jnp.asarray(generator.normal(size=(vocab_size, width)), jnp.float32))
        self.head = nnx.Param(jnp.asarray(scale * generator.normal(size=(width, vocab_size)), jnp.float32))

    def __call__(self, ids, tokens=None, caches=None, hooks=None) -> Output:
        x = self.embedding[...][ids]
        mean = jnp.cumsum(x, axis=1) / (1 + jnp.arange(ids.shape[1]))[None, :, None]
        return Output((x + 2.0 * mean) @ self.head[...])


def mean_model_log_probs(model: MeanModel, inputs: list[int]) -> np.ndarray:
    """[n, V] log-probabilities in float64, token by token, written apart from the model above."""
    embedding, head = np.asarray(model.embedding[...], np.float64), np.asarray(model.head[...], np.float64)
    rows = []
    for end in range(1, len(inputs) + 1):
        hidden = embedding[inputs[end - 1]] + 2.0 * np.mean([embedding[token] for token in inputs[:end]], axis=0)
        logits = hidden @ head
        top = logits.max()
        rows.append(logits - top - np.log(np.sum(np.exp(logits - top))))
    return np.stack(rows)


class Bytes:
    """A byte tokenizer: 256 bytes and three specials."""

    vocab_size, bos_id, eos_id, pad_id = 259, 256, 257, 258
    fingerprint = "bytes-for-tests"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids) -> str:
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")

    def byte_length(self, ids) -> int:
        return sum(token < 256 for token in ids)


@dataclasses.dataclass(frozen=True)
class Document:
    text: str
    source: str = "test"
    name: str = "document"


@dataclasses.dataclass(frozen=True)
class Corpus:
    files: tuple = ()
    bytes: int = 0
    hash: str = "0" * 64


class Pipeline:
    def __init__(self, texts: list[str]) -> None:
        self.documents = [Document(text, name=f"file{index}.txt") for index, text in enumerate(texts)]
        self.corpus = Corpus(tuple(texts), sum(map(len, texts)))
        self.tokenizer = Bytes()

    def heldout_documents(self) -> list[Document]:
        return self.documents


def texts(count: int, seed: int = 0, longest: int = 300) -> list[str]:
    generator = np.random.default_rng(seed)
    return [
        "".join(generator.choice(list("abcdefgh \né"), size=int(generator.integers(1, longest)))) for _ in range(count)
    ]


def write_run(
    folder, attention: str, *, seed: int = 0, steps: int = 300, scale: float = 0.3, documents=None, evaluated=True
):
    """A run folder as training leaves it, its numbers made up, its evaluation that of a `MeanModel`."""
    import json

    import evaluation
    from configs import command_line, fields

    config = command_line.load(f"configs/lm.py:attention={attention},size=tiny")
    config.name, config.seed, config.train.steps = f"{attention}-{seed}" if seed else attention, seed, steps
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields.plain(config)))
    generator = np.random.default_rng(seed + len(attention))
    base = 0.05 * generator.normal()
    with open(folder / "metrics.jsonl", "w") as lines:
        for step in range(5, steps + 1, 5):
            loss = 1.2 + base + 4.3 * (1 + step / 12) ** -0.9 + 0.05 * generator.normal()
            speed = 9000 * (1 + base) * (0.3 if step == 5 else 1 + 0.02 * generator.normal())
            lines.write(json.dumps({"step": step, "time": step * 0.4, "loss": loss, "tokens_per_second": speed}) + "\n")
    with open(folder / "samples.jsonl", "w") as lines:
        for prompt in ("def ", "import ", "class "):
            text = "forward(self, value):\n    return <self>.value & 1\n"
            lines.write(json.dumps({"step": steps, "prompt": prompt, "text": text}) + "\n")
    if evaluated:
        pipeline = Pipeline(documents or texts(40, seed=3))
        model = MeanModel(Bytes.vocab_size, seed=seed + len(attention), scale=scale)
        results = evaluation.evaluate(model, Bytes(), pipeline, config=config, step=steps)
        (folder / "eval.jsonl").write_text(json.dumps({"step": steps, **results.json()}) + "\n")
    return folder
