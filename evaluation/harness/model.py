"""A model of ours as lm-evaluation-harness asks it: log-likelihoods, rolling log-likelihoods, continuations.

    lm = JaxLM(model, tokenizer)
    lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])

Source: lm-evaluation-harness 0.4.13, `TemplateLM` and the rules of its `HFLM`.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from configs.errors import unknown
from evaluation.contract import EvaluationError
from evaluation.harness import plan
from evaluation.harness.answers import Answers
from evaluation.harness.chat import ChatTemplate
from evaluation.harness.forward import ContinuationScorer, Device
from evaluation.harness.generation import TextGenerator
from evaluation.scoring import rolling_windows
from models.decoder import DecoderLM
from models.sampling import Sampling

log = logging.getLogger("tessera.evaluation")

DRAWN = ("temperature", "top_k", "top_p", "min_p")
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "num_return_sequences": 1}

Report = Callable[[str, int, int], None]


class JaxLM(TemplateLM):
    """A decoder language model and its tokenizer behind lm-evaluation-harness's interface.

    Every process of a run makes one and answers all requests (rank 0 of a world of 1, for the harness); the mesh of
    `layout` spreads the rows of each batch. The model must not change while this lives.
    """

    def __init__(
        self,
        model: DecoderLM,
        tokenizer: Any,
        *,
        layout: Any | None = None,
        batch_size: int | str = "auto",
        max_length: int = 0,
        max_gen_toks: int = 0,
        add_bos: bool | None = None,
        template: ChatTemplate | None = None,
        seed: int = 0,
        answers: Answers | None = None,
        report: Report | None = None,
    ) -> None:
        """`batch_size` rows, or "auto": as many as make `plan.TOKENS` padded tokens. `max_length` 0 is the model's.

        `max_gen_toks` is what tasks get that do not say (0: 256, or half of `max_length` if that is less). `add_bos`
        puts the tokenizer's bos before every text (None: if the tokenizer says so). Draws come from `seed` and the
        place of a request. `answers` keeps what was answered. `report(what, done, total)` is told how far it is.

        Raises:
            EvaluationError: lengths or a batch size that cannot be.
        """
        super().__init__()
        longest = model.setting.max_length
        if not 0 <= max_length <= longest:
            raise EvaluationError(f"max_length must be 1 to the model's {longest}, or 0 for all, got {max_length}")
        if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size > 0):
            raise EvaluationError(f"batch_size must be a number of rows or auto, got {batch_size!r}")
        self.tokenizer, self.max_length, self.batch_size = tokenizer, max_length or longest, batch_size
        self.max_gen_toks = max_gen_toks or min(256, self.max_length // 2)
        self.add_bos = tokenizer.adds_bos if add_bos is None else add_bos
        self.template, self.seed, self.answers, self.report = template, seed, answers, report
        self._marked = False  # Texts come from a chat template, in which the text of a special is the special.
        rows = 0 if batch_size == "auto" else int(batch_size)
        self.compiled = Device(model, layout)
        self._scorer = ContinuationScorer(self.compiled, batch_size=rows)
        self._generator = TextGenerator(self.compiled, tokenizer, batch_size=rows)

    # What the harness wants to know

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without context: bos, or the end id of a tokenizer that has none."""
        return self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Equal for equal ids and templates."""
        template = "" if self.template is None else f"-{hashlib.sha256(self.template.text.encode()).hexdigest()[:16]}"
        return f"{self.tokenizer.fingerprint[:16]}{template}"

    @property
    def device(self) -> str:
        """The kind of device that computes."""
        return jax.devices()[0].platform

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Ids of a text, with bos before it if `add_special_tokens` (None: `add_bos`, unless a chat has it)."""
        del options
        if self._marked:
            ids = self.tokenizer.encode_marked(string)
            before = self.add_bos if add_special_tokens is None else add_special_tokens
            return ids if not before or ids[:1] == [self.tokenizer.bos_id] else [self.tokenizer.bos_id, *ids]
        before = self.add_bos if add_special_tokens is None else add_special_tokens
        return [self.tokenizer.bos_id] * before + self.tokenizer.encode(string)

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; specials give nothing."""
        del skip_special_tokens
        return self.tokenizer.decode(tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, for the record."""
        return None if not chat_template or self.template is None else self.template.text

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as one text. A template that refuses a system message gets the chat without, as HFLM has it."""
        if self.template is None:
            raise EvaluationError("this tokenizer has no chat template: leave --apply_chat_template out")
        self._marked = True
        try:
            return self.template.render(chat_history, add_generation_prompt=add_generation_prompt)
        except EvaluationError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            log.warning("the chat template refuses system messages: they are left out")
            return self.template.render(rest, add_generation_prompt=add_generation_prompt)

    # Requests

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each continuation after its context."""
        ask = super().loglikelihood
        found = self._remembered("loglikelihood", requests, lambda new: ask(new, disable_tqdm=True))
        return [(float(value), bool(greedy)) for value, greedy in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """The log-probability of each text, every token after as much of it as the model takes.

        The windows are those of `get_rolling_token_windows`: bos, then the text's own ids only. (HFLM also scores the
        bos that some tokenizers put before a text, after the bos of the window.)
        """
        return [float(value) for value in self._remembered("loglikelihood_rolling", requests, self._rolling)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """A continuation of each context, up to the first stop string, the end-of-text id or `max_gen_toks` tokens.

        Raises:
            EvaluationError: an option that is not known, or so many new tokens that no context fits.
        """
        return self._remembered("generate_until", requests, self._generated)

    def _remembered(self, kind: str, requests: Sequence[Any], ask: Callable[[Sequence[Any]], list]) -> list:
        """Kept answers where there are any; the others are asked for, and kept as they come."""
        if self.answers is None:
            return ask(requests)
        found = [None if _drawn(request.args) else self.answers.get(kind, request.args) for request in requests]
        missing = [index for index, answer in enumerate(found) if answer is None]
        for index, answer in zip(missing, ask([requests[index] for index in missing]) if missing else (), strict=True):
            found[index] = answer
        return found

    def _keep(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        self.cache_hook.add_partial(kind, arguments, answer)
        if self.answers is not None and not _drawn(arguments):
            self.answers.add(kind, arguments, answer)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], disable_tqdm: bool = True, **options: Any
    ) -> list[tuple[float, bool]]:
        groups = plan.groups([(context, ids) for _, context, ids in requests], self.max_length)
        results: list[Any] = [None] * len(requests)
        done = 0
        for index, scores in self._scorer(groups):
            for asked, (values, greedy) in zip(groups[index].asked, scores, strict=True):
                for number in asked:
                    results[number] = (float(values.astype(np.float64).sum()), bool(greedy.all()))
                    if requests[number][0] is not None:
                        self._keep("loglikelihood", requests[number][0], results[number])
                    done += 1
            self._tell("log-likelihoods", done, len(requests))
        return results

    def _rolling(self, requests: Sequence[Any]) -> list[float]:
        windows, owner = [], []
        for number, request in enumerate(requests):
            ids = self.tokenizer.encode(request.args[0])
            for window in rolling_windows(ids, self.prefix_token_id, self.max_length):
                begin = len(window.inputs) - window.scored + 1
                windows.append((window.inputs[:begin], window.targets[len(window.targets) - window.scored :]))
                owner.append(number)
        totals, left = [0.0] * len(requests), np.bincount(owner, minlength=len(requests))
        for number in np.flatnonzero(left == 0).tolist():
            self._keep("loglikelihood_rolling", requests[number].args, 0.0)
        groups, done = plan.groups(windows, self.max_length), 0
        for index, scores in self._scorer(groups):
            for asked, (values, _) in zip(groups[index].asked, scores, strict=True):
                for number in (owner[window] for window in asked):
                    totals[number] += float(values.astype(np.float64).sum())
                    left[number] -= 1
                    done += 1
                    if not left[number]:
                        self._keep("loglikelihood_rolling", requests[number].args, totals[number])
            self._tell("rolling log-likelihoods", done, len(windows))
        return totals

    def _generated(self, requests: Sequence[Any]) -> list[str]:
        options = [self._options(request.args[1]) for request in requests]
        drawn = [number for number, (*_, sampling) in enumerate(options) if sampling.temperature]
        places = {number: place for place, number in enumerate(drawn)}  # The same whatever else has been kept.
        alike: dict[Sampling, list[int]] = {}
        for number, (*_, sampling) in enumerate(options):
            alike.setdefault(sampling, []).append(number)
        texts, done = [""] * len(requests), 0
        for sampling, numbers in alike.items():
            until, limits = [options[number][0] for number in numbers], [options[number][1] for number in numbers]
            prompts = [
                self.tok_encode(requests[number].args[0])[-(self.max_length - limit) :] or [self.prefix_token_id]
                for number, limit in zip(numbers, limits, strict=True)
            ]
            found = self._generator(
                prompts, limits=limits, until=until, sampling=sampling, seed=self.seed,
                numbers=[places.get(number, 0) for number in numbers],
            )  # fmt: skip
            for index, text in found:
                number = numbers[index]
                texts[number] = text
                self._keep("generate_until", requests[number].args, text)
                done += 1
                self._tell("continuations", done, len(requests))
        return texts

    def _options(self, given: Mapping[str, Any]) -> tuple[list[str], int, Sampling]:
        """(stop strings, new tokens, how tokens are drawn) of a task's generation_kwargs."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
        until, new = [str(stop) for stop in options.pop("until") if stop], options.pop("max_gen_toks")
        draws = options.pop("do_sample")
        drawn = {name: options.pop(name) for name in DRAWN if options.get(name) is not None}
        for name, value in options.items():
            if value is not None and (name not in NEUTRAL or value != NEUTRAL[name]):
                raise EvaluationError(
                    unknown("generation option", name, ("until", "max_gen_toks", "do_sample", *DRAWN))
                )
        if not 0 < new < self.max_length:
            raise EvaluationError(
                f"{new} new tokens leave no room for a context in a model of {self.max_length}: give fewer, "
                "as in --gen_kwargs=max_gen_toks=64"
            )
        temperature = float(drawn.pop("temperature", 1.0))
        try:
            return until, new, Sampling(temperature if draws else 0.0, **drawn)
        except (ValueError, TypeError) as error:
            raise EvaluationError(f"generation options: {error}") from error

    def _tell(self, what: str, done: int, total: int) -> None:
        if self.report is not None:
            self.report(what, done, total)


def _drawn(arguments: Sequence[Any]) -> bool:
    """Whether a request is for random draws, which are made anew each time."""
    options = arguments[1] if len(arguments) > 1 and isinstance(arguments[1], Mapping) else {}
    return bool(options.get("do_sample") or (options.get("do_sample") is None and options.get("temperature")))
