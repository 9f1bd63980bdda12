"""Continuous batching: requests of all lengths share one decode step, and come and go between steps."""

import bisect
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from kernels.tokens import Tokens
from layers.cache import Caches
from layers.paged import PagedCache
from models.decoder import DecoderLM
from models.sampling import Sampling
from models.serving.handover import Left, Prefill, Prefilled
from models.serving.kept import Kept, Layout, in_force, kept, placed
from models.serving.pages import Pages


class Source(Protocol):
    """Where prompts are read: `Prefill`, or one in another process."""

    def handed(self, prompt: Sequence[int], target: Sequence[Kept]) -> Prefilled:
        """Logits after the prompt, and what is left of it where `target` says."""


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt to continue. `tokens` are the new ids so far, without the stop id that ended them; `state` is
    "waiting", "running", "done" or "cancelled"."""

    number: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    tokens: list[int] = dataclasses.field(default_factory=list)
    state: str = "waiting"


@dataclasses.dataclass
class _Row:
    """A running request: how many places of its cache are filled, how many new tokens it has had since it came (it
    may have had more before it was sent back), and the last one."""

    request: Request
    length: int
    had: int
    token: int


class Engine:
    """Serves a model to many requests at once.

        engine = Engine(model, rows=8)
        request = engine.submit(prompt, max_new_tokens=100)
        for done in engine.run(): ...

    A request gets the tokens that `models.generate` gives a prompt at place `request.number` with the same seed,
    whoever else is served. Prompts are read by `prefill` one by one, each padded to a power of two, and handed over to
    the pages of the decoding `layout`. What runs is compiled once per length of prompts, once per `Sampling`, and once
    for the step, whatever comes and goes.
    """

    def __init__(
        self,
        model: DecoderLM,
        *,
        rows: int = 8,
        pages: int | None = None,
        page_size: int = 64,
        layout: Layout | None = None,
        prefill: Source | None = None,
        dtype: str | None = None,
        seed: int = 0,
    ) -> None:
        """`rows` requests run at a time. `pages` of `page_size` tokens hold what they remember (None: enough for all
        rows at the model's max_length); layers with a state or a window need none, and hold so much for each row.
        `layout` is the mesh that decodes (None: one device), and reads prompts unless there is a `prefill`. `dtype` is
        that of the caches, by default the compute dtype.

        Raises: as `models.serving.kept.kept`, for a layer or a mesh that cannot be served.
        """
        if rows < 1:
            raise ValueError(f"an engine needs at least one row, not {rows}")
        self.layout = layout
        if prefill is None:
            prefill = Prefill(model, layout)
            model = prefill.model
        self.prefill, self.model = prefill, placed(model, layout)
        self.kept = kept(self.model, layout, dtype)
        self._definition, self._state = nnx.split(self.model)
        longest = -(-model.setting.max_length // max(1, page_size))
        self.pages = Pages(rows * longest if pages is None else pages, page_size)
        self._caches = tuple(one.empty(rows, self.pages.count, page_size) for one in self.kept)
        self._paged = any(one.paged for one in self.kept)
        self._key = jax.random.key(seed)
        self._rows: list[_Row | None] = [None] * rows
        self._table = np.full((rows, longest), self.pages.count, np.int32)
        self._waiting: list[Request] = []  # By number.
        self._submitted = 0

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._waiting) or any(self._rows)

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stop_ids: Sequence[int] = (),
    ) -> Request:
        """Puts a prompt in the queue; it ends before the first id of `stop_ids`.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, more tokens than the model's max_length or than
                all pages hold.
        """
        prompt = tuple(int(token) for token in prompt)
        self._check(prompt, max_new_tokens)
        request = Request(self._submitted, prompt, max_new_tokens, sampling, frozenset(map(int, stop_ids)))
        self._submitted += 1
        if max_new_tokens:
            self._waiting.append(request)
        else:
            request.state = "done"
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request where it is; one that is done stays so."""
        if request.state == "waiting":
            self._waiting.remove(request)
            self.pages.release(request)  # It has some if its prompt failed to be read.
        elif request.state == "running":
            self._leave(self._row_of(request))
        else:
            return
        request.state = "cancelled"

    def step(self) -> list[Request]:
        """Lets waiting requests in while there is room, then gives each running one its next token. Returns those that
        ended.

        The oldest request goes first. Where pages run out, the youngest running one gives its own back and waits; when
        it comes back it is computed again as it was, with the tokens that it has.
        """
        ended = self._admit()
        self._make_room()
        return ended + self._decode()

    def run(self) -> Iterator[Request]:
        """Steps until nothing is left to do, and yields requests as they end."""
        while self.busy:
            yield from self.step()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stop_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """New ids for every prompt, in their order; requests from before are served along."""
        options: dict[str, Any] = dict(max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids)
        requests = [self.submit(prompt, **options) for prompt in prompts]
        while any(request.state in ("waiting", "running") for request in requests):
            self.step()
        return [request.tokens for request in requests]

    # Requests in and out

    def _admit(self) -> list[Request]:
        ended = []
        while self._waiting and None in self._rows:
            request = self._waiting[0]
            again = min(max(1, len(request.tokens)), request.max_new_tokens - 1)  # The last token is not cached.
            if not self._hold(request, len(request.prompt) + again):
                break
            logits, layers = self.prefill.handed(request.prompt, self.kept)
            del self._waiting[0]
            request.state, row = "running", self._rows.index(None)
            self._rows[row] = _Row(request, len(request.prompt), 0, -1)
            number, first = np.array([[request.number], [0]], np.int32)
            (token,) = np.asarray(_draw(request.sampling, logits, self._key, number, first))
            if self._take(row, int(token)):
                ended.append(request)
            else:
                self._insert(row, layers)
        return ended

    def _insert(self, row: int, layers: Left) -> None:
        held = self.pages.held(self._rows[row].request)
        self._table[row, : len(held)] = held
        with in_force(self.layout):
            self._caches = _insert(self._caches, layers, self._table[row], row)

    def _make_room(self) -> None:
        """A place for the next token of every running request, the oldest first."""
        for running in sorted(filter(None, self._rows), key=lambda row: row.request.number):
            request = running.request
            while request.state == "running" and not self._hold(request, running.length + 1):
                self._send_back(max((row.request for row in self._rows if row), key=lambda request: request.number))
            if request.state == "running":
                held = self.pages.held(request)
                self._table[self._row_of(request), : len(held)] = held

    def _hold(self, request: Request, tokens: int) -> bool:
        """Pages for so many tokens, where there are layers that need them; False if there are not enough."""
        return not self._paged or self.pages.hold(request, tokens)

    def _send_back(self, request: Request) -> None:
        self._leave(self._row_of(request))
        request.state = "waiting"
        bisect.insort(self._waiting, request, key=lambda request: request.number)

    def _leave(self, row: int) -> None:
        self.pages.release(self._rows[row].request)
        self._rows[row] = None
        self._table[row] = self.pages.count

    def _row_of(self, request: Request) -> int:
        return next(i for i, row in enumerate(self._rows) if row and row.request is request)

    # Tokens

    def _decode(self) -> list[Request]:
        running = [i for i, row in enumerate(self._rows) if row]
        if not running:
            return []
        tokens, lengths, valid = (np.zeros(len(self._rows), kind) for kind in (np.int32, np.int32, bool))
        numbers, steps = (np.zeros(len(self._rows), np.int32) for _ in range(2))
        for i in running:
            row = self._rows[i]
            tokens[i], lengths[i], valid[i] = row.token, row.length, True
            numbers[i], steps[i] = row.request.number, row.had
        with in_force(self.layout):
            logits, self._caches = _step(
                self._definition, self._state, self._caches, self._table, lengths, tokens, valid
            )
        ways = {self._rows[i].request.sampling for i in running}
        drawn = {way: np.asarray(_draw(way, logits, self._key, numbers, steps)) for way in ways}
        ended = []
        for i in running:
            row = self._rows[i]
            row.length += 1
            if self._take(i, int(drawn[row.request.sampling][i])):
                ended.append(row.request)
        return ended

    def _take(self, row: int, token: int) -> bool:
        """Gives the request in a row its next token; True if that was the last."""
        running = self._rows[row]
        request = running.request
        if running.had < len(request.tokens):  # It was here before, and keeps what it has.
            token = request.tokens[running.had]
        elif token not in request.stop_ids:
            request.tokens.append(token)
        running.token, running.had = token, running.had + 1
        if running.had <= len(request.tokens) and len(request.tokens) < request.max_new_tokens:
            return False
        self._leave(row)
        request.state = "done"
        return True

    def _check(self, prompt: tuple[int, ...], new: int) -> None:
        if not prompt:
            raise ValueError("the prompt is empty: begin it with the tokenizer's bos id")
        if min(prompt) < 0 or max(prompt) >= self.model.vocab_size:
            raise ValueError(f"the prompt has an id outside the vocabulary of {self.model.vocab_size}")
        if new < 0:
            raise ValueError(f"max_new_tokens must be at least 0, but is {new}")
        length, longest = len(prompt), self.model.setting.max_length
        if length + new > longest:
            raise ValueError(f"{length} prompt tokens and {new} new ones exceed the model's max_length {longest}")
        needed = self.pages.needed(length + max(new - 1, 0))
        if self._paged and needed > self.pages.count:
            raise ValueError(
                f"{length} prompt tokens and {new} new ones need {needed} pages of {self.pages.size}, and there are "
                f"{self.pages.count} in all"
            )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(
    definition: nnx.GraphDef, state: nnx.State, caches: tuple, table: Int[Array, "B n"], lengths: Int[Array, "B"],
    tokens: Int[Array, "B"], valid: Array,
) -> tuple[Array, tuple]:  # fmt: skip
    """Logits [B, V] after one more token per row, and the caches; rows that are not valid stay as they are."""
    model = nnx.merge(definition, state)
    layers: Left = tuple(one.with_rows(table, lengths) if isinstance(one, PagedCache) else one for one in caches)
    told = Tokens(index=lengths[:, None], valid=valid[:, None])
    out = model(tokens[:, None], told, Caches(layers, lengths))
    after = (cache.with_rows(None, None) if isinstance(cache, PagedCache) else cache for cache in out.caches.layers)
    return out.logits[:, 0], tuple(after)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(caches: tuple, layers: Left, table: Int[Array, " n"], row: Array) -> tuple:
    """The caches with what is left of a prompt: in the pages of its table, or in its row of what has a fixed size."""

    def of_layer(cache: Any, left: Any) -> Any:
        if isinstance(cache, PagedCache):
            return cache.filled(left, table)
        return jax.tree.map(lambda whole, one: whole.at[row].set(one[0]), cache, left)

    return tuple(map(of_layer, caches, layers))


@functools.partial(jax.jit, static_argnums=0)
def _draw(sampling: Sampling, logits: Array, key: Array, numbers: Int[Array, "B"], steps: Int[Array, "B"]) -> Array:
    """The next token of every row, by the key of its request and step: as `models.generate` draws them."""
    fold = jax.vmap(jax.random.fold_in)
    return sampling.draw(logits, fold(jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers), steps))


__all__ = ["Engine", "Request", "Source"]
