"""Generate: prompts in, streamed text out."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from teal_cli.config import GenerateConfig
from teal_cli.console import Reporter
from teal_cli.decode.chat import Message, encode_prompt, stop_ids, wants_chat
from teal_cli.decode.choice import Choice
from teal_cli.decode.compiling import Compiling
from teal_cli.decode.engine import Engine
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.decode.speculate.speculator import Speculator
from teal_cli.decode.streaming import text_streamer
from teal_cli.model_loading import load_model, ranks_for
from teal_cli.models.loading import use_threads
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.sparse import SparsityCounter, control_of, neuron_sparsity, sparse_layers, use_backend
from teal_cli.steps.artefacts import checkpoint_for
from teal_cli.steps.drafts import speculator_for
from teal_cli.steps.positions import check_characters, require_fit
from teal_cli.workspace import Workspace

# Counting dropped inputs at every step took 15 % of the speed of SmolLM2-135M on two Zen cores.
_COUNT_EVERY = 8


@dataclass(frozen=True)
class Speculated:
    """What drafts gave in one reply."""

    drafts: str
    """As `--speculate` has it."""
    acceptance: float | None
    """Of the drafted tokens up to and with the first wrong one of each pass, the share of right ones; None for none."""
    tokens_per_pass: float | None
    """Tokens that a pass of the dense model gave; None for a reply of one token."""
    drafted: int
    passes: int
    close: int
    """Tokens whose two best logits lay within rounding of a 16-bit dtype: one pass may choose another than single
    steps. 0 where a pass gives their bits."""


@dataclass(frozen=True)
class Reply:
    """One reply and what it cost."""

    text: str
    prompt_tokens: int
    tokens: int
    prefill_seconds: float
    """Until the first token; where none came, until the end."""
    tokens_per_second: float | None
    """Of the decode steps; None for a reply of one token."""
    realised_sparsity: float | None
    """Counted at the first decode step and at every eighth after it, on a GPU at every step, those
    launched ahead of a stop included; None where nothing ran sparse."""
    neuron_sparsity: float | None
    """Of it, the share of MLP neurons that were zero, in mode intrinsic."""
    decodes: str
    """`sparse`, or `dense`: asked for, or chosen because sparse steps were measured to be slower."""
    compiled: bool
    """Whether steps were compiled by torch.compile, which measured faster or was asked for."""
    speculation: Speculated | None
    """What drafts gave, where the dense model's text was written from them; `realised_sparsity` is then theirs."""
    interrupted: bool
    """Ended by Ctrl-C; the text is what had come until then."""


def _load(config: GenerateConfig, workspace: Workspace, reporter: Reporter) -> Any:
    """The model at its sparsity; exported first where need be."""
    folder = workspace.source.folder
    if _skips(config):
        folder = checkpoint_for(config, config.sparsity, workspace, reporter)
    elif config.quantise is not None:  # quantised weights lie in a checkpoint, dense too
        folder = checkpoint_for(config, 0.0, workspace, reporter, allocation="uniform")
    architecture = workspace.architecture(config)
    return load_model(
        folder, device=config.device, dtype=config.dtype, architecture=architecture, ranks=ranks_for(config)
    )


def _skips(config: GenerateConfig) -> bool:
    """Whether the model, or what drafts for it, is to skip inputs."""
    return config.sparsity != 0.0 if config.speculate is None else config.speculate.sparse


class Generator:
    """A loaded model that answers prompts.

    Args:
        config: model, sparsity, sampling.
        reporter: where missing stages are announced.
        workspace: of the model, if it is there already.
        messages: what is asked first, if that is known and not the configuration's prompt: what is too long is refused
            before anything is made for it.

    Raises:
        TealError: anything wrong with model, calibration or machine.
    """

    def __init__(
        self,
        config: GenerateConfig,
        reporter: Reporter,
        workspace: Workspace | None = None,
        messages: list[Message] | None = None,
    ) -> None:
        use_threads(config.threads)
        workspace = workspace or Workspace.of(config, reporter)
        workspace.require_decoder(config, "generate")
        require_fit(config, workspace, messages)
        self.config = config
        self.name = workspace.source.name
        self.tokenizer = load_tokenizer(workspace.source.folder)
        self.chat = wants_chat(self.tokenizer, config.chat)
        if config.mode == "intrinsic":
            self.model, _ = workspace.load_intrinsic(config, "generate")
        else:
            self.model = _load(config, workspace, reporter)
        if sparse_layers(self.model):  # before the engine, which takes the backend's path
            use_backend(control_of(self.model), config.backend, self.model.device, self.model.dtype)
        choosing = config.speculate is None
        compiling = Compiling(config.compile, tokens=config.max_new_tokens) if choosing else None
        never_worse = config.backend == "auto" and choosing
        self.engine = Engine(self.model, never_worse=never_worse, compiling=compiling, keep="prompts")
        self._because: str | None = None
        self._say = reporter.say
        self._say_because()
        for line in self.engine.path.notes:
            reporter.say(line)
        if not self.engine.keeps_state:
            reporter.say(
                f"model type {self.model.config.model_type} has no cache: each token reads the whole text again"
            )
        self._turns = 0
        self._said = set[str]()
        self.stop = stop_ids(self.model, self.tokenizer, config.stop)
        if self.engine.control is not None:
            self.engine.control.enabled = _skips(config)
        self.speculator: Speculator | None = None
        if config.speculate is not None:
            self.speculator, _ = speculator_for(self.engine, config.speculate, config.draft_tokens, reporter, {})

    def _say_because(self) -> None:
        """Why no path of our own decodes, once; its check may be the reason."""
        if self.engine.general_because != self._because:
            self._because = self.engine.general_because
            self._say(f"decoding with transformers' forward, not our own ({self._because})")

    def reply(
        self,
        messages: list[Message],
        write: Callable[[str], object] = lambda text: None,
        config: GenerateConfig | None = None,
    ) -> Reply:
        """Answer a conversation, handing text to `write` as it comes; another configuration may say how to sample.

        With a configuration of its own the reply is that of its seed. Without one the first reply is, and later
        ones draw other numbers, as the turns of a conversation must.

        Ctrl-C (KeyboardInterrupt) ends the reply and is reported in it, not raised.
        """
        turn = 0
        if config is None:
            config, turn = self.config, self._turns
            self._turns += 1
        check_characters(self.tokenizer, messages, self.engine.max_length)
        prompt = encode_prompt(self.tokenizer, messages, self.chat)
        streamer = text_streamer(self.tokenizer, write)
        sampling = SamplingConfig(config.temperature, config.top_k, config.top_p, seed=config.seed + turn)
        writer = self.engine if self.speculator is None else self.speculator
        control = self.engine.control if self.speculator is None else self.speculator.counts
        self.engine.check_prompt(prompt, config.max_new_tokens)  # before the clock
        self._say_because()
        length = prompt.shape[1] + config.max_new_tokens
        choice = self.engine.choose(prompt, length) if self.engine.chooses else None
        for line in () if choice is None else choice.lines:
            if line not in self._said:
                self._said.add(line)
                self._say(line)
        count, interrupted = 0, False
        first = last = started = time.perf_counter()
        with control.counting() if control else nullcontext(SparsityCounter()) as counter:
            try:
                for token in writer.generate(
                    prompt, max_new_tokens=config.max_new_tokens, sampling=sampling, stop=self.stop
                ):
                    last = time.perf_counter()
                    first = last if count == 0 else first
                    count += 1
                    streamer.put([token])
                    counter.active = count % _COUNT_EVERY == 1
            except KeyboardInterrupt:
                interrupted = True
            text = streamer.end()
        if count == 0:  # a stop token came first, or Ctrl-C
            first = time.perf_counter()
        return Reply(
            text=text,
            prompt_tokens=prompt.shape[1],
            tokens=count,
            prefill_seconds=first - started,
            tokens_per_second=(count - 1) / (last - first) if count > 1 else None,
            realised_sparsity=counter.model_wide(),
            neuron_sparsity=self._neuron_sparsity(counter),
            decodes=self._decodes(choice),
            compiled=choice is not None and choice.compiled,
            speculation=self._speculated(),
            interrupted=interrupted,
        )

    def to_json(self, prompt: str, reply: Reply) -> dict[str, Any]:
        """The contract of `teal generate --json` (docs/formats.md)."""
        return {
            "model": self.name,
            "prompt": prompt,
            "chat": self.chat,
            "mode": self.config.mode,
            "target_sparsity": self.target_sparsity,
            **asdict(reply),
            "seed": self.config.seed,
        }

    def _speculated(self) -> Speculated | None:
        if self.speculator is None:
            return None
        tally = self.speculator.tally
        return Speculated(
            drafts=str(self.config.speculate),
            acceptance=tally.acceptance,
            tokens_per_pass=tally.tokens_per_pass,
            drafted=tally.drafted,
            passes=tally.passes,
            close=tally.close,
        )

    def _decodes(self, choice: Choice | None) -> str:
        if self.speculator is not None:
            return "dense"
        control = self.engine.control
        sparse = control is not None and control.decodes_sparse
        return ("sparse" if sparse else "dense") if choice is None else choice.decodes

    def _neuron_sparsity(self, counter: SparsityCounter) -> float | None:
        return neuron_sparsity(self.model, counter.by_projection()) if self.config.mode == "intrinsic" else None

    @property
    def target_sparsity(self) -> float:
        """What was asked of the loaded model, or of its drafts; 0 where it is dense, or sparse by itself."""
        control = self.engine.control
        if control is None or not control.enabled or self.config.mode == "intrinsic":
            return 0.0
        return float(self.model.config.quantization_config.plan.target_sparsity)
