"""Tokenizers as Hugging Face folders have them: tokenizer.json, and which of its tokens are special."""

import json
import pathlib
import shutil
import tempfile
from typing import Any

from models.pretrained import reader
from models.pretrained.errors import PretrainedError

_OURS = "tessera_tokenizer.json"
_CHAT = "chat_template.jinja"
_THEIRS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", _CHAT)
_BYTE_SPECIALS = {"bos": "<|bos|>", "eos": "<|eos|>", "pad": "<|pad|>"}


def write(tokenizer: Any, folder: pathlib.Path) -> dict[str, int]:
    """Writes a tokenizer into a folder; `bos_token_id` and so on, as config.json wants them.

    `tokenizer` is one of this framework (it has `save`), one of the `tokenizers` library, a folder, or None. Raises
    PretrainedError for a folder without a tokenizer.
    """
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, str | pathlib.Path):
        return _copied(pathlib.Path(tokenizer), folder)
    if hasattr(tokenizer, "to_str"):
        (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(scratch)
        return _copied(pathlib.Path(scratch), folder)


def bytes_as_bpe() -> Any:
    """The byte tokenizer as a file of the `tokenizers` library: byte b is id b, then begin, end, padding."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    # The library writes bytes as printable characters: those that are not one already come after U+0100, in order.
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in shown]
    character = {byte: chr(byte) if byte in shown else chr(256 + others.index(byte)) for byte in range(256)}
    made = tokenizers.Tokenizer(models.BPE(vocab={character[byte]: byte for byte in range(256)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(_BYTE_SPECIALS.values()))
    return made


def _copied(source: pathlib.Path, folder: pathlib.Path) -> dict[str, int]:
    if (source / _OURS).exists():
        settings = reader.read_json(source / _OURS)
        if settings.get("kind") == "byte":
            text, specials = bytes_as_bpe().to_str(), _BYTE_SPECIALS
        else:
            text = (source / "tokenizer.json").read_text(encoding="utf-8")
            specials = {role: settings[role] for role in ("bos", "eos", "pad") if settings.get(role)}
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        named = {f"{role}_token": token for role, token in specials.items()}
        said = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
        (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        (folder / "special_tokens_map.json").write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
        if (source / _CHAT).exists():
            shutil.copyfile(source / _CHAT, folder / _CHAT)
    else:
        if not (source / "tokenizer.json").exists():
            raise PretrainedError(f"{source} has no tokenizer.json")
        for name in _THEIRS:
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
    return _ids(folder)


def _ids(folder: pathlib.Path) -> dict[str, int]:
    import tokenizers

    path = folder / "tokenizer_config.json"
    settings = reader.read_json(path) if path.exists() else {}
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = {}
    for role in ("bos", "eos", "pad"):
        token = settings.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = made.token_to_id(token) if isinstance(token, str) else None
        if number is not None:
            found[f"{role}_token_id"] = number
    return found
