"""llama.cpp beside ours on a CPU: whether its file is of the same model and width, and how fast its llama-bench is."""

import json
import math
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teal_cli.bench.timing import Spread
from teal_cli.errors import ArtefactError, MachineError, UsageError, shown
from teal_cli.models.gguf_header import parts_of, read_header

_TYPES = {
    **{0: "F32", 1: "F16", 30: "BF16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0"},
    **{10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS"},
}
"""Names of the types of ggml that model files are made of."""
_OF_WIDTH = {
    "float32": ("F32",),
    "bfloat16": ("BF16",),
    "float16": ("F16",),
    "int8": ("Q8_0",),
    "int4": ("Q4_0", "Q4_1", "Q4_K", "IQ4_NL", "IQ4_XS"),
}
_SHAPE = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
"""What a GGUF file calls a size, behind the name of its architecture, and what transformers does."""
_OUTPUT, _EMBEDDING = b"output.weight", b"token_embd.weight"


@dataclass(frozen=True)
class LlamaFile:
    """A GGUF file as far as it must be like the model beside it."""

    file: Path
    weights: str
    """Type of most weights of the blocks, such as Q4_0."""
    output_weights: str
    """Type of the output layer."""
    sizes: Mapping[str, int]
    """By the names of transformers: hidden_size, .., vocab_size."""

    @classmethod
    def read(cls, file: Path) -> "LlamaFile":
        """Read a file's header; of a split file those of all parts.

        Raises:
            ArtefactError: no GGUF file, a damaged one, or one without blocks.
        """
        headers = [read_header(part) for part in parts_of(file)]
        values = headers[0].values
        architecture = values.get("general.architecture")
        sizes = {ours: values.get(f"{architecture}.{theirs}") for theirs, ours in _SHAPE.items()}
        found = {name: size for name, size in sizes.items() if type(size) is int}
        kinds: dict[str, int] = {}
        outputs: dict[bytes, str] = {}
        for tensor in (tensor for header in headers for tensor in header.tensors):
            kind = _TYPES.get(tensor.kind, f"type {tensor.kind}")
            if tensor.name in (_OUTPUT, _EMBEDDING):
                outputs[tensor.name] = kind
                found["vocab_size"] = tensor.shape[-1]
            elif tensor.name.startswith(b"blk.") and len(tensor.shape) > 1:
                kinds[kind] = kinds.get(kind, 0) + math.prod(tensor.shape)
        if not kinds or not outputs:
            raise ArtefactError(f"GGUF file {file} holds no language model: it has no blocks, or no output layer")
        return cls(
            file, max(kinds, key=lambda kind: kinds[kind]), outputs.get(_OUTPUT, outputs.get(_EMBEDDING, "")), found
        )

    def require_shape(self, name: str, config: Any) -> None:
        """Refuse a file of another model.

        Args:
            name: of the model beside it.
            config: its transformers configuration.

        Raises:
            UsageError: a size differs.
        """
        text = config.get_text_config()
        for size, theirs in self.sizes.items():
            ours = getattr(text, size, None)
            if ours is not None and ours != theirs:
                raise UsageError(
                    f"{self.file} (flag --llama-model) is no file of {name}: its {size} is {theirs:,}, and that of "
                    f"{name} is {ours:,}"
                )

    def require_width(self, width: str) -> None:
        """Refuse a file whose weights are wider or narrower than ours.

        Args:
            width: a dtype's name, or how ours are quantised, such as int4-32-output.

        Raises:
            UsageError: it is.
        """
        wanted = _OF_WIDTH[width.partition("-")[0]]
        if self.weights not in wanted:
            raise UsageError(
                f"{self.file} (flag --llama-model) has {self.weights} weights and ours are {width}: speeds are "
                f"compared at one width, which is {' or '.join(wanted)} there"
            )


@dataclass(frozen=True)
class LlamaCppResult:
    """How fast llama.cpp decoded, in turn with ours."""

    build: str
    """What llama-bench says of itself: commit and number."""
    model: str
    """Name of the file."""
    weights: str
    output_weights: str
    weight_bytes: int
    """Of all its tensors."""
    threads: int
    cache: str
    """Type of its keys and values."""
    tokens_per_second: Spread


class LlamaBench:
    """llama-bench with a file, ready to be timed once a round.

    Args:
        program: path of llama-bench.
        model: its file.
        threads: of a round.
        prompt_tokens: in the cache before the first timed token.
        new_tokens: timed a round.

    Raises:
        MachineError: not a program that runs, or one that is no llama-bench, or an old one.
    """

    def __init__(
        self,
        program: Path,
        model: LlamaFile,
        *,
        threads: int,
        prompt_tokens: int,
        new_tokens: int,
    ) -> None:
        self.program, self.model, self.threads = program.absolute(), model, threads
        self.prompt_tokens, self.new_tokens = prompt_tokens, new_tokens
        self.speeds: list[float] = []
        if "--n-depth" not in _output([str(self.program), "--help"]):
            raise MachineError(f"{program} is no llama-bench, or one from before May 2025: it has no option --n-depth")
        self._said = self._once(1, 0)  # what cannot load the file fails before anything is timed

    def round(self) -> float:
        """Decode once; tokens a second, without the prompt.

        Raises:
            MachineError: the program failed, or printed what is no result.
        """
        self._said = self._once(self.new_tokens, self.prompt_tokens)
        self.speeds.append(float(self._said["avg_ts"]))
        return self.speeds[-1]

    def result(self) -> LlamaCppResult:
        """Of all rounds so far, at least one."""
        return LlamaCppResult(
            build=f"{self._said.get('build_commit')} ({self._said.get('build_number')})",
            model=self.model.file.name,
            weights=self.model.weights,
            output_weights=self.model.output_weights,
            weight_bytes=int(self._said["model_size"]),
            threads=self.threads,
            cache=str(self._said.get("type_k")),
            tokens_per_second=Spread.of(self.speeds),
        )

    def _once(self, new_tokens: int, depth: int) -> dict[str, Any]:
        # No layer on a GPU, should it be built for one.
        counts = {"-p": 0, "-n": new_tokens, "-d": depth, "-t": self.threads, "-r": 1, "-ngl": 0}
        words = [word for flag, count in counts.items() for word in (flag, str(count))]
        printed = _output([str(self.program), "-m", str(self.model.file.absolute()), "-o", "json", *words], must=True)
        try:
            (entry,) = json.loads(printed)
            if not (math.isfinite(entry["avg_ts"]) and entry["avg_ts"] > 0 and entry["model_size"] > 0):
                raise ValueError("a speed is a number above 0")
            if (entry["n_gen"], entry["n_depth"], entry["n_threads"]) != (new_tokens, depth, self.threads):
                raise ValueError("it timed something else")
        except (ValueError, KeyError, TypeError) as error:
            raise MachineError(f"{self.program} printed no result that can be read: {shown(printed[:80])}") from error
        return dict(entry)


def _output(command: list[str], *, must: bool = False) -> str:
    """What a program prints; with `must` only of one that ends well."""
    try:
        done = subprocess.run(  # noqa: S603 (the user names the program)
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, check=False
        )
    except OSError as error:
        raise MachineError(f"{command[0]} cannot be run: {error.strerror}") from error
    if must and done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise MachineError(f"{command[0]} failed with exit code {done.returncode}: {shown(last)}")
    return done.stdout
