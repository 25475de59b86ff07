"""The Python door: five functions that take what the command line takes, and call the same steps.

    import teal_cli
    model = teal_cli.load("smollm2-135m", sparsity=0.5)
    print(model.generate("Why is the sky blue?"))

Options are the keys of the YAML files (`teal VERB --help`, docs/formats.md), checked as they are there.
What is missing is made: `load` calibrates and exports first if need be. Nothing is printed unless
`quiet=False`. Every function raises `teal_cli.errors.TealError` for what a user can cause.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from teal_cli.checkpoint.calibration import Calibration
from teal_cli.checkpoint.export import ExportSummary
from teal_cli.config import AdaptConfig, CalibrateConfig, EvalConfig, ExportConfig, GenerateConfig, SharedConfig
from teal_cli.config_files import load_as
from teal_cli.console import Reporter
from teal_cli.decode.chat import Message
from teal_cli.errors import UsageError, nearest
from teal_cli.evaluation.results import EncoderResult, EvalResult
from teal_cli.steps import adapt as adapt_step
from teal_cli.steps import calibrate as calibrate_step
from teal_cli.steps import evaluate as evaluate_step
from teal_cli.steps import export as export_step
from teal_cli.steps.generate import Generator, Reply

C = TypeVar("C", bound=SharedConfig)
_A_REPLY = {"max_new_tokens", "temperature", "top_k", "top_p", "seed"}
"""Options of each reply; all others belong to the loaded model."""


def _configured(kind: type[C], verb: str, model: str | Path, options: dict[str, Any]) -> tuple[C, Reporter]:
    if "json" in options:
        raise UsageError("json is for the command line: the function returns the result")
    config = load_as(kind, verb, {"quiet": True, **options, "model": str(model)})
    return config, Reporter(config.quiet)


def _messages(prompt: str | list[Message]) -> list[Message]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for message in messages or ():
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UsageError(f'a message is {{"role": "user" or "assistant", "content": text}}, not {message!r}')
    if not messages or not messages[-1]["content"].strip():
        raise UsageError("the prompt is empty")
    return messages


def calibrate(model: str | Path, **options: Any) -> Calibration:
    """Measure a model's hidden states and keep them in RUNS/<model>, as `teal calibrate`.

    Args:
        model: alias, folder, .gguf file or hub id.
        options: keys of calibrate: dataset, tokens, seq_len, ..

    Raises:
        TealError: anything wrong with options, model, text or machine.
    """
    return calibrate_step.calibrate(*_configured(CalibrateConfig, "calibrate", model, options))


def export(model: str | Path, sparsity: float = 0.5, **options: Any) -> ExportSummary:
    """Write a TEAL checkpoint, as `teal export`; its `folder` says where.

    Args:
        model: the dense model.
        sparsity: share of the blocks' weights that a token is not to read, in [0, 1).
        options: keys of export: allocation, out, weights, quantise, ..

    Raises:
        TealError: anything wrong with options, model, calibration or disk.
    """
    return export_step.export(*_configured(ExportConfig, "export", model, {**options, "sparsity": sparsity}))


def adapt_model(model: str | Path, recipe: str = "recover", **options: Any) -> adapt_step.AdaptSummary:
    """Train a model to do with less, as `teal adapt`; its `folder` says where it lies, its `record` what came of it.

    Args:
        model: the dense model.
        recipe: recover, or another of docs/adapt.md.
        options: keys of adapt: sparsity, dataset, tokens, lora, options, ..

    Raises:
        TealError: anything wrong with options, model, text or machine.
    """
    return adapt_step.adapt(*_configured(AdaptConfig, "adapt", model, {**options, "recipe": recipe}))


def evaluate(model: str | Path, **options: Any) -> EvalResult | EncoderResult:
    """Quality on held-out text, dense and sparse, as `teal eval`.

    Args:
        model: the dense model, or a TEAL checkpoint.
        options: keys of eval: sparsity, allocation, dataset, tokens, seq_len, ..

    Raises:
        TealError: anything wrong with options, model, text or machine.
    """
    return evaluate_step.evaluate(*_configured(EvalConfig, "eval", model, options))


def load(model: str | Path, sparsity: float | None = None, **options: Any) -> "Model":
    """A model that answers prompts.

    Args:
        model: the dense model, or a TEAL checkpoint.
        sparsity: target in [0, 1), 0 for dense; 0.5, or the checkpoint's own, unless given.
        options: keys of generate: allocation, device, dtype, backend, chat, stop, temperature, ..

    Raises:
        TealError: anything wrong with options, model, calibration or machine.
    """
    own = {} if sparsity is None else {"sparsity": sparsity}
    return Model(model, {**options, **own})


class Model:
    """A loaded model (from `load`): `model` and `tokenizer` are those of transformers.

    Args:
        model: as for `load`.
        options: as for `load`.
        messages: what is asked first, if that is known: what is too long is refused before the model is calibrated.
    """

    def __init__(self, model: str | Path, options: dict[str, Any], messages: list[Message] | None = None) -> None:
        config, reporter = _configured(GenerateConfig, "generate", model, options)
        self._name, self._options = model, options
        self._generator = Generator(config, reporter, messages=messages)
        self.model = self._generator.model
        self.tokenizer = self._generator.tokenizer

    @property
    def sparsity(self) -> float:
        """What was asked for; 0 where it is dense."""
        return self._generator.target_sparsity

    def reply(self, prompt: str | list[Message], write: Callable[[str], object] | None = None, **options: Any) -> Reply:
        """Answer one prompt, or the conversation so far, and say what it cost.

        Args:
            prompt: text, or messages [{"role": "user", "content": ..}, ..].
            write: handed the text as it comes, each character as soon as no later token can change it.
            options: max_new_tokens, temperature, top_k, top_p or seed of this reply.

        Raises:
            TealError: an empty or too long prompt, or wrong options.
        """
        for name in options:
            if name not in _A_REPLY:
                raise UsageError(f"{name!r} is not an option of a reply{nearest(name, _A_REPLY)}")
        messages = _messages(prompt)
        config, _ = _configured(GenerateConfig, "generate", self._name, {**self._options, **options})
        found = self._generator.reply(messages, write or (lambda text: None), config)
        if found.interrupted:
            raise KeyboardInterrupt
        return found

    def generate(
        self, prompt: str | list[Message], write: Callable[[str], object] | None = None, **options: Any
    ) -> str:
        """The text of `reply`."""
        return self.reply(prompt, write, **options).text


def generate(prompt: str | list[Message], model: str | Path, sparsity: float | None = None, **options: Any) -> str:
    """One reply of a model that is loaded for it; `load` keeps it.

    Args:
        prompt: text, or messages.
        model: as for `load`.
        sparsity: as for `load`.
        options: as for `load`.

    Raises:
        TealError: as `load` and `Model.reply`.
    """
    own = {} if sparsity is None else {"sparsity": sparsity}
    return Model(model, {**options, **own}, _messages(prompt)).generate(prompt)
