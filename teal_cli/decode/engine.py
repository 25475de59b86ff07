"""The decode engine: a KV cache, a dense prefill, and steps of one token.

Three ways to take a step. On a GPU a Llama-family model takes the fused path
(`teal_cli.decode.paths.fused`), any other model transformers' own forward with a static cache; both
become one CUDA graph a token (`TokenLoop`). On a CPU, and for ALiBi, it is transformers' forward with a growing cache.
"""

import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from teal_cli.decode.cache import FixedCache
from teal_cli.decode.paths.fused import FusedDecoder, Session, unsupported_reason
from teal_cli.decode.probe import check_decoding
from teal_cli.decode.sampling import Sampler, SamplingConfig
from teal_cli.decode.state import CarriedState, StateNames, WholeSequence
from teal_cli.errors import ArtefactError
from teal_cli.models.architectures import find_projections
from teal_cli.sparse import SparsityControl, control_of, lay_out_, replace_projections_

_READ_BEHIND = 4
"""Steps that a GPU may run ahead of the host, which reads each token only to show it and to stop."""


class Engine:
    """Decodes with a dense or sparse transformers model.

    The prefill is dense whatever its length (a prompt of a single token too); every step after it
    runs sparse where the model has sparse layers.

    Args:
        model: a causal language model in eval mode. On a GPU the projections of a dense one are laid
            out for the kernels (their weights move, they are not copied).
        compact: whether the fused path may be taken.

    Raises:
        ArtefactError: a model whose state teal does not know.
    """

    captures = True
    """Whether a step can become a CUDA graph."""

    def __init__(self, model: Any, *, compact: bool = True) -> None:
        self.model = model
        self.device: torch.device = next(model.parameters()).device
        self.control: SparsityControl | None
        try:
            self.control = control_of(model)
        except LookupError:
            self.control = None
        self.decoder: FusedDecoder | None = None
        self._session: Session | None = None
        self._states: StateNames | None = self._state_names()
        self._checked: set[tuple[bool, str, int]] = set()
        self.general_because: str | None = None
        """Why the fused path is not taken, where a GPU could take it."""
        if compact and self.device.type != "cpu":
            self.decoder = self._compact_decoder()

    def _state_names(self) -> StateNames | None:
        return StateNames(self.model)

    def _compact_decoder(self) -> FusedDecoder | None:
        control = self.control
        self.general_because = unsupported_reason(self.model, control or SparsityControl())
        if self.general_because is not None:
            return None
        if control is None:
            names = [projection.name for projection in find_projections(self.model)]
            control = replace_projections_(self.model, names)
            lay_out_(self.model)
        return FusedDecoder(self.model, control)

    @property
    def max_length(self) -> int:
        """Positions that the model was made for."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else 1 << 31

    def new_cache(self, length: int) -> Any:
        """An empty KV cache for `length` positions: fixed memory on a GPU, growing on a CPU; or another state.

        On the CPU the growing cache is not slower (15.6 against 14.7 tokens/s on SmolLM2-135M, two
        Zen cores) and attends to the written positions only. So does it for ALiBi on a GPU: transformers' Falcon
        makes its biases for the written positions, and a fixed cache has more. The states of recurrent blocks have
        no positions, and whether there is one yet is the host's knowledge, which a graph would freeze.
        """
        if self.decoder is not None:
            self._session = None  # the memory of the last cache, before that of the next
            return self.decoder.new_cache(length)
        states = self._states
        if states is not None and (own := states.new()) is not None:
            return own
        recurrent = states is not None and states.is_recurrent
        if self.device.type == "cpu" or recurrent or getattr(self.model.config, "alibi", False):
            return DynamicCache(config=self.model.config)
        return StaticCache(config=self.model.config, max_cache_len=length)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, cache: Any) -> Tensor:
        """Run a prompt densely: (batch, tokens) int64 -> (batch, vocabulary) logits of the last."""
        if self._states is not None:
            self._states.forget(input_ids.shape[0])
        with self.control.dense() if self.control else nullcontext():
            return self._forward(input_ids, cache)

    @torch.no_grad()
    def step(self, token: Tensor, cache: Any) -> Tensor:
        """One decode step: (batch, 1) int64 -> (batch, vocabulary) logits."""
        session = self.open(cache)
        return self._forward(token, cache) if session is None else session.step(token).clone()

    def open(self, cache: Any) -> Session | None:
        """The fused path's session on a prefilled cache; None where another path decodes."""
        if self.decoder is None or not isinstance(cache, FixedCache):
            return None
        if self._session is None or self._session.cache is not cache or self._session.stale:
            self._session = None  # before the next one takes its memory
            self._session = self.decoder.open(cache)
        return self._session

    def _forward(self, input_ids: Tensor, cache: Any) -> Tensor:
        if self._states is None:
            raise TypeError("an engine without names of states has a forward of its own")
        if isinstance(cache, WholeSequence):
            return self._run_again(input_ids, cache)
        arguments = self._states.arguments(input_ids, cache)
        output = self.model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **arguments)
        self._states.keep(cache, input_ids, output)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _run_again(self, input_ids: Tensor, sequence: WholeSequence) -> Tensor:
        """A step without a state: all tokens, and those after the prompt drop inputs by masking."""
        is_step = sequence.ids is not None
        ids = sequence.extend(input_ids)
        with self.control.masked(sequence.prompt) if self.control and is_step else nullcontext():
            logits: Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits

    @property
    def keeps_state(self) -> bool:
        """Whether a step costs one token; False where every step runs the whole sequence again."""
        return self._states is None or self._states.name is not None

    @torch.no_grad()
    def without_cache(self, prompt: Tensor, tokens: Tensor) -> Tensor:
        """What decoding must give: (batch, tokens, vocabulary) logits after each token, from one pass over all.

        Args:
            prompt: (batch, prompt tokens) int64, dense.
            tokens: (batch, tokens) int64, as decoding runs them: sparse by masking, where that is on.
        """
        ids, keep = torch.cat([prompt, tokens], dim=1), tokens.shape[1]
        with self.control.masked(prompt.shape[1]) if self.control else nullcontext():
            logits: Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
        return logits[:, -keep:]

    def check(self, prompt: Tensor) -> None:
        """Make sure, once for a path, that a step gives what a pass without a cache gives (`probe.check_decoding`).

        Args:
            prompt: (batch, tokens) int64 that is going to be decoded.

        Raises:
            ArtefactError: it does not.
        """
        control, rows = self.control, prompt.shape[0]
        if not self.keeps_state:
            return
        with control.uncounted() if control else nullcontext():
            if (path := (False, "", rows)) not in self._checked:
                with control.switched_off() if control else nullcontext():
                    check_decoding(self, prompt)
                self._checked.add(path)
            if control is not None and (path := (*control.decoding[:2], rows)) not in self._checked:
                check_decoding(self, prompt)
                self._checked.add(path)

    def check_prompt(self, input_ids: Tensor, new_tokens: int) -> None:
        """Everything that can be said before a reply; what takes time does so once (`check`).

        Raises:
            ArtefactError: an empty prompt, more positions than the model has, or a model that loses its state.
        """
        if input_ids.shape[1] == 0:
            raise ArtefactError("the prompt has no tokens")
        self.check_length(input_ids.shape[1], new_tokens)
        self.check(input_ids)

    def check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        """Fail before the work where the model's context cannot hold it.

        Raises:
            ArtefactError: more positions than the model has.
        """
        if prompt_tokens + new_tokens > self.max_length:
            raise ArtefactError(
                f"{prompt_tokens} prompt tokens and {new_tokens} new ones exceed the model's context of "
                f"{self.max_length}: shorten the prompt or --max-new-tokens"
            )

    def generate(
        self, input_ids: Tensor, *, max_new_tokens: int, sampling: SamplingConfig, stop: frozenset[int] = frozenset()
    ) -> Iterator[int]:
        """Yield tokens as they are decoded; a stop token ends the sequence and is not yielded.

        On a GPU a few steps are always under way when a token is yielded, so that nobody waits for
        the host; at a stop token they are thrown away.

        Args:
            input_ids: (1, tokens) int64 prompt.
            max_new_tokens: at most this many.
            sampling: how tokens are chosen.
            stop: token ids that end the reply.

        Raises:
            ArtefactError: an empty prompt, more positions than the model has, logits that are not numbers, or steps
                that do not give what a pass without a cache gives.
        """
        self.check_prompt(input_ids, max_new_tokens)
        sampler = Sampler(sampling, self.device)
        cache = self.new_cache(input_ids.shape[1] + max_new_tokens)
        logits = self.prefill(input_ids.to(self.device), cache)
        self.check_numbers(logits)  # the host waits for the first token anyway
        token = sampler.next_token(logits)
        loop = TokenLoop(self, cache, token, sampler)
        under_way = deque([_Reading(token)])
        launched = 1
        for index in range(max_new_tokens):
            ahead = _READ_BEHIND if self.device.type == "cuda" and index > 0 else 0
            while launched < max_new_tokens and launched <= index + ahead:
                under_way.append(_Reading(loop.advance()))
                launched += 1
            value = under_way.popleft().value()
            if value in stop:
                return
            yield value

    def check_numbers(self, logits: Tensor) -> None:
        """Refuse logits among which nothing can be chosen. Some may be -inf: a model can rule tokens out.

        Args:
            logits: (..., vocabulary).

        Raises:
            ArtefactError: a NaN, an infinite one, or nothing but -inf.
        """
        if not bool(logits.amax(-1).isfinite().all()):
            dtype = str(self.model.dtype).removeprefix("torch.")
            raise ArtefactError(
                f"the model's logits are not numbers (NaN or infinite) in {dtype}: its weights are damaged, or that "
                "dtype is too narrow for them (--dtype float32)"
            )


class _Reading:
    """A token on its way to the host."""

    def __init__(self, token: Tensor) -> None:
        self._event = None
        if token.is_cuda:
            self._host = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
            self._host.copy_(token, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = token.clone()

    def value(self) -> int:
        """The token, when it has come."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._host)


class TokenLoop:
    """Step after step: each token is chosen on the device and is the next step's input.

    On a GPU the first step runs as it is (kernels are compiled, libraries wake up), the second is
    captured as a CUDA graph with its sampling, and every further one is a replay. A forward that
    cannot be captured goes on without a graph.

    Args:
        engine: whose model decodes.
        cache: prefilled.
        token: (batch, 1) int64, the first token after the prompt.
        sampler: chooses the tokens.
    """

    def __init__(self, engine: Engine, cache: Any, token: Tensor, sampler: Sampler) -> None:
        self._engine, self._cache, self._sampler = engine, cache, sampler
        self._session = engine.open(cache)
        self._token = token.clone()
        self.logits: Tensor
        """(batch, vocabulary), of the last step; a replay overwrites them."""
        if self._session is not None:
            self._token = self._session.token.view(-1, 1)
            self._token.copy_(token)
        self._made_for = engine.control.decoding if engine.control else None
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        # A sliding cache moves by rules in Python and a growing one takes memory anew, which a graph would freeze.
        moves = isinstance(cache, DynamicCache | CarriedState | WholeSequence) or any(getattr(cache, "is_sliding", ()))
        self.captures = engine.captures and engine.device.type == "cuda" and not moves
        """Whether steps are, or are going to be, replays of a graph."""

    @staticmethod
    def first_steps(engine: Engine) -> int:
        """Steps at the start of a loop that compile and capture, which a timing leaves out."""
        return 2 if engine.device.type == "cuda" else 0

    @torch.no_grad()
    def advance(self) -> Tensor:
        """Decode one token: (batch, 1) int64 on the device, overwritten by the next step."""
        self._renew()
        if self._session is not None:
            self._session.begin()
        counter = self._engine.control.counter if self._engine.control else None
        counting = self._session is None and counter is not None and counter.active  # by the layers, on the host's side
        if not self.captures or self._steps == 0 or counting:
            self._body()
        else:
            if self._graph is None:
                self._capture()
            if self._graph is not None:
                self._graph.replay()
            else:
                self._body()
        self._steps += 1
        if self._session is not None:
            self._session.end()
        return self._token

    def _renew(self) -> None:
        """Drop what was prepared or captured for another plan."""
        control = self._engine.control
        if control is not None and control.decoding != self._made_for:
            self._made_for, self._graph = control.decoding, None
        if self._session is not None and self._session.stale:
            token, self._graph = self._token.clone(), None
            session = self._session = self._engine.open(self._cache)
            if session is not None:
                self._token = session.token.view(-1, 1)
                self._token.copy_(token)

    def _body(self) -> None:
        session = self._session
        if session is None:
            self.logits = self._engine._forward(self._token, self._cache)
            self._token.copy_(self._sampler.next_token(self.logits))
            return
        self.logits = session.launch()
        if self._sampler.greedy:
            session.pick()
        else:
            session.token.copy_(self._sampler.next_token(self.logits).view(-1))

    def _capture(self) -> None:
        graph = self._empty_graph()
        try:
            with torch.cuda.graph(graph):
                self._body()
        except RuntimeError as error:
            # Our own launches can be captured: an error there is ours. Memory that is missing, too.
            if self._session is not None or isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            self.captures = False
            torch.cuda.synchronize(self._engine.device)
            # Seen once (H200, torch 2.11): after a capture that failed no random number could be drawn in the process
            # ("Offset increment outside graph capture"). A capture that succeeds takes the generators out of it.
            with warnings.catch_warnings(), torch.cuda.graph(self._empty_graph()):
                warnings.simplefilter("ignore")  # it captures nothing
            return
        self._graph = graph

    def _empty_graph(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        if self._sampler.generator is not None:
            graph.register_generator_state(self._sampler.generator)
        return graph
