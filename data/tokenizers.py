"""Text to ids and back: bytes, a byte-level BPE trained on the corpus, or any `tokenizer.json`."""

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from data.errors import DataError, log, shorten

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"  # The specials of tokenizers trained here.
# What other people's tokenizer.json files call them, tried in this order.
_BOS_NAMES = (BOS, "<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>", "[BOS]", "[CLS]", "<|endoftext|>")
_EOS_NAMES = (EOS, "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]", "[SEP]")
_PAD_NAMES = (PAD, "<pad>", "[PAD]")
_SETTINGS = "tessera_tokenizer.json"
_CHUNK = 1 << 20  # Bytes of text per call into the library.
SMALLEST_BPE = 256 + 3  # All bytes and the three specials.


class Tokenizer(Protocol):
    """What the rest of the framework knows of a tokenizer."""

    vocab_size: int  # Largest id + 1.
    bos_id: int
    eos_id: int
    pad_id: int
    adds_bos: bool  # Whether a model that was trained with it expects bos_id before a text.
    fingerprint: str  # Equal for tokenizers that give equal ids.

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without specials; the text of a special in `text` is ordinary text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; specials and ids outside the vocabulary give nothing."""

    def byte_length(self, ids: Iterable[int]) -> int:
        """Bytes of UTF-8 that `ids` stand for; specials count 0."""

    def encode_all(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """All texts end to end: (ids in the smallest unsigned type that holds them, int64 number of ids per text)."""

    def save(self, folder: str | os.PathLike) -> None:
        """Writes a folder that `load_tokenizer` reads."""

    def describe(self) -> str:
        """One line for people; says which ids begin and end a document."""


class ByteTokenizer:
    """UTF-8 bytes are the ids 0..255; then begin, end, padding. Nothing to train, nothing to download."""

    bos_id, eos_id, pad_id = 256, 257, 258
    vocab_size = 259
    adds_bos = True
    fingerprint = hashlib.sha256(b"tessera byte tokenizer 1").hexdigest()

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer. Bytes that are not UTF-8 become U+FFFD."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def byte_length(self, ids: Iterable[int]) -> int:
        """See Tokenizer."""
        flat = _flat(ids)
        return int(((flat >= 0) & (flat < 256)).sum())

    def encode_all(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """See Tokenizer."""
        encoded = [text.encode("utf-8") for text in texts]
        return np.frombuffer(b"".join(encoded), np.uint8), np.array([len(item) for item in encoded], np.int64)

    def save(self, folder: str | os.PathLike) -> None:
        """See Tokenizer."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, _SETTINGS).write_text(json.dumps({"kind": "byte"}, indent=1) + "\n")

    def describe(self) -> str:
        """See Tokenizer."""
        return "byte tokenizer: 256 bytes, begin 256, end 257, padding 258"


class JsonTokenizer:
    """A tokenizer in the `tokenizer.json` format of the `tokenizers` library.

    `specials` may name the tokens for "bos", "eos" and "pad"; those not given are looked for among the names in
    common use. A tokenizer without a begin token begins documents with its end token, as GPT-2 does.
    """

    def __init__(self, text: str, specials: dict[str, str] | None = None, *, where: str = "tokenizer.json"):
        """`text` is the content of the file; `where` is named in errors. Raises DataError."""
        import tokenizers  # The default tokenizer does not need the library.

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # The library raises the bare class.
            raise DataError(f"{where}: not a sound tokenizer.json ({shorten(error)}); replace the file") from error
        self._text, self._specials = text, dict(specials or {})
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # "<|eos|>" inside a document must not end it.
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{where}: the vocabulary is empty; replace the file")
        self.vocab_size = max(vocabulary.values()) + 1
        self._names = {i: token for token, i in vocabulary.items()}
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = {i for i, token in added.items() if token.special}

        registered = {token.content: i for i, token in added.items()}
        eos, bos, pad = (
            self._given(role, vocabulary, where)
            if role in self._specials
            else next((registered[name] for name in names if name in registered), None)
            for role, names in (("eos", _EOS_NAMES), ("bos", _BOS_NAMES), ("pad", _PAD_NAMES))
        )
        if eos is None:
            named = ", ".join(sorted(token.content for token in added.values())) or "none"
            raise DataError(
                f"{where}: no end-of-text token (special tokens: {shorten(named, 80)}); "
                f"name it as eos_token in a tokenizer_config.json beside it"
            )
        self.eos_id: int = eos
        self.bos_id: int = eos if bos is None else bos
        self.pad_id: int = eos if pad is None else pad  # Never a target and never attended to: any id will do.
        # The file says so itself, or the tokenizer was trained here, where documents begin with it.
        self.adds_bos = bos is not None and (
            self._names[bos] == BOS or self._tokenizer.encode("a").ids[:1] == [bos]  # With the file's own specials.
        )
        self._special_ids |= {self.bos_id, self.eos_id, self.pad_id}
        self._bytes = _byte_lengths(text, self._names, self._special_ids, self.vocab_size)
        sides = json.dumps([self.bos_id, self.eos_id, self.pad_id])
        self.fingerprint = hashlib.sha256(f"{sides}\n{self._tokenizer.to_str()}".encode()).hexdigest()

    def _given(self, role: str, vocabulary: dict[str, int], where: str) -> int:
        name = self._specials[role]
        if name not in vocabulary:
            raise DataError(f"{where}: the {role} token {name!r} is not in its vocabulary; correct the settings")
        return vocabulary[name]

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_marked(self, text: str) -> list[int]:
        """Ids of `text` in which the text of a special stands for the special, as a chat template writes it."""
        return self._marked.encode(text, add_special_tokens=False).ids

    def token(self, i: int) -> str:
        """The text of an id, also of a special; "" outside the vocabulary."""
        return self._names.get(i, "")

    @functools.cached_property
    def _marked(self):
        import tokenizers

        marked = tokenizers.Tokenizer.from_str(self._text)
        marked.no_padding()
        marked.no_truncation()
        return marked

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        known = [i for i in map(int, ids) if i in self._names and i not in self._special_ids]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def byte_length(self, ids: Iterable[int]) -> int:
        """See Tokenizer. Exact and additive for byte-level vocabularies; others are decoded and measured."""
        if self._bytes is None:
            return len(self.decode(ids).encode("utf-8"))
        flat = _flat(ids)
        return int(self._bytes[flat[(flat >= 0) & (flat < self.vocab_size)]].sum())

    def encode_all(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """See Tokenizer."""
        smallest = np.min_scalar_type(self.vocab_size - 1)
        ids, lengths = [np.zeros(0, smallest)], []
        for chunk in _chunks(texts):
            for encoding in self._tokenizer.encode_batch_fast(chunk, add_special_tokens=False):
                ids.append(np.asarray(encoding.ids, smallest))
                lengths.append(len(encoding.ids))
        return np.concatenate(ids), np.array(lengths, np.int64)

    def save(self, folder: str | os.PathLike) -> None:
        """See Tokenizer."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        roles = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        settings = {"kind": "json", **{role: self._names[i] for role, i in roles.items()}, "sha256": _sha(self._text)}
        Path(folder, "tokenizer.json").write_text(self._text, encoding="utf-8")
        Path(folder, _SETTINGS).write_text(json.dumps(settings, indent=1, ensure_ascii=True) + "\n")

    def describe(self) -> str:
        """See Tokenizer."""
        roles = (("begin", self.bos_id), ("end", self.eos_id), ("padding", self.pad_id))
        named = ", ".join(f"{role} {i} {self._names[i]!r}" for role, i in roles)
        return f"tokenizer of {self.vocab_size:,} ids: {named}"


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """A byte-level BPE of at most `vocab_size` ids (specials and all 256 bytes included), as GPT-2 splits words.

    Any text can be encoded and comes back exactly. A small corpus may yield fewer ids: `vocab_size` of the result
    says how many. Raises DataError below SMALLEST_BPE.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_BPE:
        raise DataError(f"tokenizer 'bpe:{vocab_size}': needs at least {SMALLEST_BPE} ids (256 bytes, 3 specials)")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_chunks(texts), trainer)
    return JsonTokenizer(tokenizer.to_str(), {"bos": BOS, "eos": EOS, "pad": PAD}, where=f"bpe:{vocab_size}")


def cached_bpe(texts: Iterable[str], digest: str, vocab_size: int, cache: str | os.PathLike) -> Tokenizer:
    """The BPE of a corpus from the cache, trained and put there on first use.

    `digest` is the hash of `texts`; the folder is named after it and the size. The folder appears whole or not at
    all, so that several processes may race for it: all use the one that came first. A damaged one is reported in
    the log and made again.
    """
    name = hashlib.sha256(f"bpe 1 {vocab_size} {digest}".encode()).hexdigest()[:16]
    folder = Path(cache, f"bpe-{vocab_size}-{name}")
    if folder.exists():
        try:
            return load_folder(folder)
        except DataError as error:
            log.warning("cached tokenizer is damaged and will be trained again: %s", error)
            shutil.rmtree(folder, ignore_errors=True)
    trained = train_bpe(texts, vocab_size)
    if trained.vocab_size < vocab_size:
        log.warning("the corpus yields only %d of the %d ids asked of the tokenizer", trained.vocab_size, vocab_size)
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=cache, prefix=".bpe-"))
    except OSError as error:
        raise DataError(f"tokenizer cache {str(cache)!r}: {error.strerror}; set config.data.tokenizer_cache") from error
    try:
        trained.save(scratch)
        os.chmod(scratch, 0o755)  # mkdtemp makes it private; other users of a shared cache may read it.
        os.replace(scratch, folder)
    except OSError as error:
        if not folder.exists():
            raise DataError(f"tokenizer cache {str(cache)!r}: {error.strerror}; free space or move it") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return load_folder(folder)


def load_tokenizer(spec: str | os.PathLike) -> Tokenizer:
    """A tokenizer from "byte", a folder (saved by `save`, or with a tokenizer.json), or a tokenizer.json file.

    Raises DataError when it is missing or damaged, or when no end token can be found.
    """
    if spec == "byte":
        return ByteTokenizer()
    if str(spec).startswith("bpe:"):
        raise DataError(f"tokenizer {str(spec)!r} is trained on a corpus: use data.build, or load its saved folder")
    path = Path(spec).expanduser()
    if path.is_dir():
        return load_folder(path)
    if not path.exists():
        raise DataError(f"tokenizer {str(spec)!r}: not byte, bpe:<size> or an existing file; see config.data.tokenizer")
    return JsonTokenizer(_read(path), _neighbours(path.parent), where=str(path))


def load_folder(folder: Path) -> Tokenizer:
    """A tokenizer from a folder; see `load_tokenizer`."""
    settings_path, path = folder / _SETTINGS, folder / "tokenizer.json"
    if not settings_path.exists():
        if not path.exists():
            raise DataError(f"tokenizer folder {str(folder)!r}: holds neither {_SETTINGS} nor tokenizer.json")
        return JsonTokenizer(_read(path), _neighbours(folder), where=str(path))
    settings = _json_object(settings_path)
    if settings.get("kind") == "byte":
        return ByteTokenizer()
    if settings.get("kind") != "json":
        raise DataError(f"{settings_path}: unknown kind of tokenizer {settings.get('kind')!r}; known: byte, json")
    text = _read(path)
    if _sha(text) != settings.get("sha256"):
        raise DataError(f"{path}: changed or damaged since it was saved (its sha256 differs); restore or retrain it")
    return JsonTokenizer(text, {role: settings[role] for role in ("bos", "eos", "pad")}, where=str(path))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({shorten(error)}); replace the file") from error


def _json_object(path: Path) -> dict:
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({shorten(error)}); replace the file") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object; replace the file")
    return content


def _neighbours(folder: Path) -> dict[str, str]:
    """The specials that the files beside a tokenizer.json name, as Hugging Face folders have them."""
    specials: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = _json_object(folder / name) if (folder / name).exists() else {}
        for role in ("bos", "eos", "pad"):
            token = settings.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                specials[role] = token
    return specials


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _flat(ids: Iterable[int]) -> np.ndarray:
    return np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).reshape(-1)


def _chunks(texts: Iterable[str]) -> Iterable[list[str]]:
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@functools.cache
def _byte_alphabet() -> frozenset[str]:
    from tokenizers import pre_tokenizers

    return frozenset(pre_tokenizers.ByteLevel.alphabet())


def _byte_lengths(text: str, names: dict[int, str], specials: set[int], size: int) -> np.ndarray | None:
    """Bytes per id of a byte-level vocabulary (one character of a token is one byte); None for other kinds."""
    decoder = json.loads(text).get("decoder") or {}
    kinds = [decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))]
    if "ByteLevel" not in kinds:
        return None
    lengths = np.zeros(size, np.int64)
    for i, token in names.items():
        if i not in specials:
            lengths[i] = len(token) if _byte_alphabet().issuperset(token) else len(token.encode("utf-8"))
    return lengths
