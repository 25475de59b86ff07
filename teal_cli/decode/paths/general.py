"""The general decode path: transformers' own forward, with a cache of transformers or another state."""

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from teal_cli.decode.cache import FixedCache
from teal_cli.decode.compiling import CompiledSteps, compiled_positions
from teal_cli.decode.paths.base import LastTokens, Path, Session, Stepper, refuse_lengths
from teal_cli.decode.paths.program import known_program, unsupported_rope
from teal_cli.decode.state import CarriedState, StateNames, WholeSequence
from teal_cli.decode.whole_cache import forget_addresses, has_windows, static_cache
from teal_cli.errors import ArtefactError, UsageError
from teal_cli.models.architectures import kind_for
from teal_cli.models.layers import Experts
from teal_cli.ranks.group import ranks_of
from teal_cli.sparse import SparsityControl, sparse_layers


@dataclass
class Ragged:
    """Rows whose prompts had different lengths: padding lies in the cache, between a prompt and what was decoded."""

    mask: Tensor
    """(rows, positions) int64: 0 for padding, 1 for tokens and for positions that are not written yet."""
    positions: Tensor
    """(rows, 1) int64: of each row's last token, in its own text."""


@dataclass
class GeneralCache:
    """What is kept of the sequences that are decoded together."""

    state: Any
    """A cache of transformers, a `CarriedState` or a `WholeSequence`."""
    positions: int
    """That it was made for."""
    rows: int = 0
    """0 before the prompt."""
    length: int = 0
    """Tokens given so far, padding included."""
    ragged: Ragged | None = None
    """None where all rows have the same length."""
    encoded: Any = None
    """What an encoder made of the prompt."""
    compiled: bool = False
    """Whether steps are compiled."""

    def truncate(self, length: int) -> None:
        """Forget what lies behind the first positions, of a cache for steppers."""
        self.state.truncate(length)
        self.length = length


class GeneralPath(Path):
    """Decodes whatever transformers can, one forward pass a step."""

    name = "general"

    def __init__(self, model: Any, control: SparsityControl | None) -> None:
        super().__init__(model, control)
        self._states = self._state_names()
        self.keeps_state = self._states is None or self._states.name is not None
        self._compiled = CompiledSteps(model)

    def _state_names(self) -> StateNames | None:
        return StateNames(self.model)

    @classmethod
    def unsupported(cls, model: Any, control: SparsityControl | None) -> str | None:
        """As `Path.unsupported`."""
        return "an encoder-decoder" if kind_for(model) == "seq2seq" else None

    def new_cache(self, length: int) -> GeneralCache:
        """An empty KV cache for `length` positions: fixed memory on a GPU, growing on a CPU; or another state.

        On the CPU the growing cache is not slower (15.6 against 14.7 tokens/s on SmolLM2-135M, two
        Zen cores) and attends to the written positions only. So does it for ALiBi on a GPU: transformers' Falcon
        makes its biases for the written positions, and a fixed cache has more; GPT-Neo's local attention likewise,
        beyond its window. The states of recurrent blocks have no positions, and whether there is one yet is the
        host's knowledge, which a graph would freeze: `new_compiled_cache` has it captured after the prompt, and its
        steps are checked.
        """
        return GeneralCache(self._new_state(length), length)

    def _new_state(self, length: int) -> Any:
        states = self._states
        if states is not None and (own := states.new()) is not None:
            return own
        config = self.model.config
        recurrent = states is not None and states.is_recurrent
        if self.device.type == "cpu" or recurrent or self._counts_keys(length):
            return DynamicCache(config=config)
        return static_cache(config, length)

    @property
    def _has_local_attention(self) -> bool:
        """Whether it is GPT-Neo's, which takes the last keys that there are for the last that were written."""
        return "local" in (getattr(self.model.config, "attention_layers", None) or ())

    def _counts_keys(self, length: int) -> bool:
        """Whether attention would count keys of a fixed cache that are not written yet."""
        config, program = self.model.config, known_program(self.model)
        alibi = getattr(config, "alibi", False) or (program is not None and program.alibi is not None)
        return alibi or (self._has_local_attention and config.window_size < length)

    def not_compiled_because(self, length: int) -> str | None:
        """As `Path.not_compiled_because`. Whether it works, only trying it says (`decode.choice`)."""
        states, kind = self._states, self.model.config.model_type
        if ranks_of(self.model) is not None:
            return "several processes hold the model"
        if states is None:
            return "the cache of an encoder-decoder grows"
        if states.name not in ("past_key_values", "cache_params"):
            return f"model type {kind} has no cache of transformers"
        if hasattr(self.model, "_setup_cache"):
            return f"the layers of model type {kind} hold their state"
        if self._counts_keys(compiled_positions(length)):
            return f"model type {kind} counts keys, and a fixed cache has more than were written"
        if any(hasattr(module, "_hf_hook") for module in self.model.modules()):
            return "weights on several devices"
        if any(layer.packed is not None for layer in sparse_layers(self.model).values()):
            return "quantised weights have kernels that torch's compiler does not know"
        sparse = self.control is not None and self.control.decodes_sparse
        if sparse and any(isinstance(module, Experts) for module in self.model.modules()):
            return "experts that skip inputs wait for the host"
        try:
            cache = self.new_compiled_cache(length)
        except KeyError:  # a kind of layer that it does not know, as transformers names it in the configuration
            return f"transformers has no static cache for model type {kind}"
        return "a window that rolls cannot be compiled" if any(cache.state.is_sliding) else None

    def new_compiled_cache(self, length: int) -> GeneralCache:
        """As `Path.new_compiled_cache`: in fixed memory, on a CPU too, the states of recurrent blocks as well."""
        positions = compiled_positions(length)
        return GeneralCache(static_cache(self.model.config, positions), positions, compiled=True)

    def prefill(self, input_ids: Tensor, cache: GeneralCache, lengths: list[int] | None) -> Tensor:
        """As `Path.prefill`. Padding needs no mask here: it comes after all tokens of its row."""
        if lengths is not None and (reason := self.equal_lengths_because(cache)) is not None:
            raise refuse_lengths(reason)
        if cache.ragged is not None:
            raise refuse_lengths("rows of different lengths cannot be given another prompt, use a new cache")
        if self._states is not None:
            self._states.forget(input_ids.shape[0])
        last, before = LastTokens.of_rows(lengths, self.device), cache.length
        logits = last.among(self._forward(input_ids, cache, last.keep))
        cache.rows, cache.length = input_ids.shape[0], before + input_ids.shape[1]
        if cache.compiled:
            forget_addresses(cache.state)
        if lengths is None:
            return logits
        mask = torch.ones(cache.rows, cache.positions, dtype=torch.int64, device=self.device)
        for row, length in enumerate(lengths):
            mask[row, before + length : cache.length] = 0
        ends = torch.tensor([[before + length - 1] for length in lengths], device=self.device)
        cache.ragged = Ragged(mask, ends)
        return logits

    def equal_lengths_because(self, cache: GeneralCache) -> str | None:
        """Why rows of different lengths cannot be decoded together; None where they can."""
        states, kind = self._states, self.model.config.model_type
        if isinstance(cache.state, WholeSequence):
            return f"model type {kind} has no cache"
        if states is None or states.is_recurrent or not isinstance(cache.state, DynamicCache | StaticCache):
            return f"model type {kind} keeps a state that padding would change"
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None) or 0
        # GPT-Neo's cache keeps all positions, and its masks count the window in them.
        has_window = has_windows(cache.state) or self._has_local_attention
        if has_window and window < cache.positions:
            return f"model type {kind} sees a window of {window} positions, which padding would fill"
        if getattr(self.model.config, "alibi", False):
            return f"model type {kind} counts distances with padding (ALiBi)"
        parameters = inspect.signature(type(self.model).forward).parameters
        if not {"attention_mask", "position_ids"} <= set(parameters):
            return f"model type {kind} takes no positions"
        if any(hasattr(module, "create_position_ids_from_input_ids") for module in self.model.modules()):
            return f"model type {kind} counts positions from its padding token on"  # RoBERTa and its kin
        return None

    def cannot_step_back_because(self) -> str | None:
        """As `Path.cannot_step_back_because`."""
        states, kind = self._states, self.model.config.model_type
        if states is None:
            return "an encoder-decoder"
        if states.is_recurrent or states.makes_its_own or states.name != "past_key_values":
            return f"model type {kind} keeps a state from which no token can be taken back"
        return unsupported_rope(self.model.config.get_text_config(), ("proportional",))

    def new_cache_for_steppers(self, length: int) -> GeneralCache:
        """As `Path.new_cache_for_steppers`: layers with a window keep all positions."""
        layers = len(DynamicCache(config=self.model.config).layers)
        return GeneralCache(FixedCache(layers, length), length)

    def stepper(self, cache: GeneralCache, *, sparse: bool) -> "GeneralStepper":
        """As `Path.stepper`.

        Raises:
            UsageError: several rows, which may keep different numbers of tokens.
        """
        if cache.rows > 1:
            raise UsageError("a batch cannot be decoded speculatively by transformers' forward: decode one sequence")
        return GeneralStepper(self, cache, sparse=sparse)

    def open(self, cache: GeneralCache) -> "GeneralSession":
        """As `Path.open`."""
        return GeneralSession(self, cache)

    def step(self, token: Tensor, cache: GeneralCache) -> Tensor:
        """A decode step: (rows, 1) int64 -> (rows, vocabulary) logits. Lengths on the host's side stay."""
        control = self.control
        counting = control is not None and control.counter is not None and control.counter.active
        if not cache.compiled or cache.ragged is not None or counting or self._states is None:
            return self._forward(token, cache, 1)[:, -1]
        kind = (None if control is None else control.decoding[:2], cache.rows, cache.positions)
        return self._compiled.logits(kind, token, self._states.arguments(token, cache.state))[:, -1]

    def run_behind(self, tokens: Tensor, cache: GeneralCache, length: int) -> Tensor:
        """(1, span) int64 behind the first positions of a cache for steppers -> (1, span, vocabulary) logits."""
        cache.truncate(length)
        logits = self._forward(tokens, cache, tokens.shape[1])
        cache.length = length + tokens.shape[1]
        return logits

    def _forward(self, input_ids: Tensor, cache: GeneralCache, keep: int | Tensor) -> Tensor:
        """(rows, tokens) int64 -> (rows, kept, vocabulary) logits."""
        if self._states is None:
            raise TypeError("a path without names of states has a forward of its own")
        if isinstance(cache.state, WholeSequence):
            return self._run_again(input_ids, cache.state)
        arguments = self._states.arguments(input_ids, cache.state)
        if cache.ragged is not None:
            cache.ragged.positions.add_(1)  # on the device: part of a captured step
            seen = cache.length + 1 if isinstance(cache.state, DynamicCache) else cache.positions
            mask = cache.ragged.mask[:, :seen]
            arguments |= {"attention_mask": mask, "position_ids": cache.ragged.positions}
        output = self.model(input_ids=input_ids, use_cache=True, logits_to_keep=keep, **arguments)
        self._states.keep(cache.state, input_ids, output)
        logits: Tensor = output.logits
        return logits

    def _run_again(self, input_ids: Tensor, sequence: WholeSequence) -> Tensor:
        """A step without a state: all tokens, and those after the prompt drop inputs by masking."""
        is_step = sequence.ids is not None
        ids = sequence.extend(input_ids)
        with self.control.masked(sequence.prompt) if self.control and is_step else nullcontext():
            logits: Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits

    def can_capture(self, cache: GeneralCache) -> bool:
        """Whether a step can become a graph.

        A sliding cache moves by rules in Python and a growing one takes memory anew, which a graph would freeze.
        """
        moves = isinstance(cache.state, DynamicCache | CarriedState | WholeSequence)
        return self.device.type == "cuda" and not moves and not any(getattr(cache.state, "is_sliding", ()))


class GeneralSession(Session):
    """Steps of transformers' forward on one cache."""

    def __init__(self, path: GeneralPath, cache: GeneralCache) -> None:
        self.path, self.cache = path, cache
        self.token = torch.zeros(cache.rows, dtype=torch.int64, device=path.device)
        self.captures = path.can_capture(cache)
        self._made_for = path.control.decoding if path.control else None

    @property
    def stale(self) -> bool:
        """As `Session.stale`: a captured graph holds what layers chose when it was captured."""
        return self.path.control is not None and self.path.control.decoding != self._made_for

    def launch(self) -> Tensor:
        """As `Session.launch`."""
        return self.path.step(self.token.view(-1, 1), self.cache)

    def begin(self) -> None:
        """Make sure of the positions where padding is masked; else transformers' forward looks after itself.

        Raises:
            ArtefactError: the cache is full. A growing one would take the token, and its mask would hide it.
        """
        if self.cache.ragged is not None and self.cache.length >= self.cache.positions:
            raise ArtefactError(f"the KV cache is full: it was made for {self.cache.positions} positions")

    def end(self) -> None:
        """The state has one more token of every row."""
        self.cache.length += 1


class GeneralStepper(Stepper):
    """Passes of transformers' forward over one cache."""

    def __init__(self, path: GeneralPath, cache: GeneralCache, *, sparse: bool) -> None:
        self._path, self._cache, self._sparse = path, cache, sparse

    @torch.no_grad()
    def run(self, tokens: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """As `Stepper.run`."""
        control = self._path.control
        with nullcontext() if control is None or self._sparse else control.dense():
            logits = self._path.run_behind(tokens, self._cache, lengths[0])
        return logits, logits.argmax(-1)
