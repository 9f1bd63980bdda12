"""Chat templates of tokenizer folders, rendered in a sandbox: a template is text from elsewhere and runs nothing."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.contract import EvaluationError


class ChatTemplate:
    """A Jinja template that makes one text of a chat, as Hugging Face tokenizer folders hold it."""

    def __init__(self, text: str, specials: Mapping[str, str]) -> None:
        """`specials` are what a template knows as bos_token, eos_token and so on. Raises EvaluationError."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.text, self._specials = text, dict(specials)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise EvaluationError(f"the tokenizer's chat template cannot be read: {error}") from error

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The chat as one text; without a generation prompt it ends with the last message, which is to be continued.

        Raises:
            EvaluationError: the template refuses the chat (as many do a system message).
        """
        from jinja2 import TemplateError

        try:
            text = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._specials,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise EvaluationError(f"the tokenizer's chat template refuses this chat: {error}") from error
        if add_generation_prompt:
            return text
        last = messages[-1]["content"].strip()
        place = text.rfind(last)
        if place < 0:
            raise EvaluationError("the tokenizer's chat template changes messages, so that none can be continued")
        return text[: place + len(last)]


def text(folder: str | pathlib.Path, name: str = "default") -> str | None:
    """The template of a tokenizer folder: chat_template.jinja, else the one called `name` in tokenizer_config.json.

    None where there is none. Raises EvaluationError for a damaged file and for an unknown name.
    """
    folder = pathlib.Path(folder)
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = _settings(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        if name not in named:
            raise EvaluationError(f"{folder} has no chat template {name!r}: it has {', '.join(map(str, named))}")
        found = named[name]
    if found is not None and not isinstance(found, str):
        raise EvaluationError(f"{folder / 'tokenizer_config.json'}: chat_template is not text")
    return found


def find(folder: str | pathlib.Path, tokenizer: Any) -> ChatTemplate | None:
    """The template of a tokenizer folder, with the specials of its tokenizer; None where there is none."""
    found = text(folder)
    if found is None:
        return None
    specials = {"bos_token": tokenizer.token(tokenizer.bos_id), "eos_token": tokenizer.token(tokenizer.eos_id)}
    return ChatTemplate(found, specials)


def _settings(file: pathlib.Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{file} is damaged: {error}; replace the file") from error
    if not isinstance(settings, dict):
        raise EvaluationError(f"{file} is damaged: it is no JSON object; replace the file")
    return settings


def _refuse(message: str) -> None:
    raise ValueError(message)
