"""The real SmolLM2-135M: quality, exactness and the commands of README.md."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from conftest import MaskedReference
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from teal_cli.cli import run
from teal_cli.config import EvalConfig
from teal_cli.console import QUIET
from teal_cli.decode.engine import Engine
from teal_cli.decode.sampling import SamplingConfig
from teal_cli.model_loading import load_model
from teal_cli.sparse import control_of, sparse_layers
from teal_cli.speculation import Speculation
from teal_cli.steps.drafts import speculator_for
from teal_cli.steps.evaluate import evaluate

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def exported(smollm2_run: Path) -> Path:
    """In its place, where evaluation finds it."""
    assert run(["export", "--runs", str(smollm2_run), "--sparsity", "0.5", "--quiet"]) == 0
    return smollm2_run / "smollm2-135m" / "fisher-0.50"


@torch.no_grad()
def test_prefill_is_exact_and_decode_is_the_masked_maths(smollm2: Path, exported: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(smollm2)
    sparse = load_model(exported, device="cpu", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "The keeper of the lighthouse wrote down the weather every evening, and the ships that passed. " * 3
    ids = tokenizer(text, return_tensors="pt").input_ids
    for length in (3, 24, ids.shape[1]):
        assert torch.equal(sparse(input_ids=ids[:, :length]).logits, dense(input_ids=ids[:, :length]).logits)
    compared = 0
    for position in range(40, 50):  # each by itself: a third of all tokens has an input too near to its threshold
        caches = DynamicCache(config=dense.config), DynamicCache(config=sparse.config)
        token = ids[:, position : position + 1]
        for model, cache in zip((dense, sparse), caches, strict=True):
            model(input_ids=ids[:, :position], past_key_values=cache)
        reference = MaskedReference(dense, {name: layer.threshold for name, layer in sparse_layers(sparse).items()})
        expected = dense(input_ids=token, past_key_values=caches[0]).logits.double()
        reference.remove()
        got = sparse(input_ids=token, past_key_values=caches[1]).logits.double()
        if reference.decided:
            assert float((got - expected).norm() / expected.norm()) < 1e-4
            compared += 1
    assert compared >= 1


def test_greedy_at_sparsity_zero_equals_generate(smollm2: Path, smollm2_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense"
    assert run(["export", "--runs", str(smollm2_run), "--sparsity", "0", "--out", str(out), "--quiet"]) == 0
    dense = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer("The history of the lighthouse begins in", return_tensors="pt").input_ids
    expected = dense.generate(ids, do_sample=False, max_new_tokens=64)[0, ids.shape[1] :].tolist()
    engine = Engine(load_model(out, device="cpu", dtype="auto"))
    got = list(engine.generate(ids, max_new_tokens=64, sampling=SamplingConfig()))
    assert len(got) == 64
    assert got[: len(expected)] == expected


@pytest.mark.parametrize("kind", ["lookup+int8", "sparse"])
def test_text_from_drafts_is_the_dense_model_s(exported: Path, kind: str) -> None:
    """And drafts are worth something: most of what the int8 copy writes is right, half of the sparse model's."""
    engine = Engine(load_model(exported, device="cpu", dtype="auto"))
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer("The keeper of the lighthouse wrote down", return_tensors="pt").input_ids
    with control_of(engine.model).switched_off():
        wanted = list(engine.generate(ids, max_new_tokens=64, sampling=SamplingConfig()))
    drafts = Speculation.parse(kind)
    decoder, _ = speculator_for(engine, drafts, 3, QUIET, {})
    assert list(decoder.generate(ids, max_new_tokens=64, sampling=SamplingConfig())) == wanted
    assert decoder.tally.acceptance > (0.8 if drafts.scheme else 0.5)


@pytest.mark.usefixtures("exported")
def test_quality_on_held_out_text(smollm2_run: Path) -> None:
    """fisher keeps more: 1.42 became 1.20 on eight sequences, with 16 thousand tokens; here 1.58 becomes 1.17."""
    bounds = {"uniform": (1.44, 1.70), "fisher": (1.07, 1.26)}
    config = EvalConfig(
        runs=smollm2_run, allocation=list(bounds), sparsity=[0.5], tokens=1024, seq_len=512, dense_prefix=256
    )
    result = evaluate(config, QUIET)
    assert result.half == "evaluation"
    assert [entry.allocation for entry in result.runs] == list(bounds)
    for entry in result.runs:
        low, high = bounds[entry.allocation]
        assert low < entry.comparison.ratio < high
        assert entry.comparison.realised_sparsity == pytest.approx(0.5, abs=0.02)


def _readme_commands() -> list[str]:
    """Lines that start with `teal` in README's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith("teal ")]


# Smaller than README says, so that the test is quick; the flags that follow win.
_QUICK = {
    "adapt": ["--tokens", "128", "--seq-len", "64", "--batch-size", "2", "--held-out-tokens", "128"],
    "calibrate": ["--tokens", "256", "--sensitivity-tokens", "128", "--seq-len", "128"],
    "eval": ["--tokens", "256", "--seq-len", "128"],
    "bench": ["--new-tokens", "4", "--repeats", "1"],
    "generate": ["--max-new-tokens", "8"],
}
_QUICK_STAGES = {
    "calibrate": {"tokens": 256, "sensitivity_tokens": 128},
    "eval": {"tokens": 256, "prompts": 1, "new_tokens": 8},
    "bench": {"new_tokens": 4},
    "generate": {"max_new_tokens": 8},
}


def _quick_recipe(path: Path) -> str:
    """The recipe, with smaller numbers of what it names."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    for stage, small in _QUICK_STAGES.items():
        assert small.keys() <= recipe[stage].keys()
        recipe[stage] |= small
    recipe["seq_len"] = 128
    recipe["bench"] |= {"repeats": 1, "sparsity": [0.5]}  # `teal bench` above has two
    return yaml.safe_dump(recipe)


def test_readme_commands(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command of README on the packaged model, in the order of the page."""
    commands = _readme_commands()
    assert {shlex.split(command)[1] for command in commands} == {
        "adapt",
        "calibrate",
        "export",
        "eval",
        "bench",
        "generate",
        "run",
        "report",
        "inspect",
        "info",
        "serve",
    }
    for command in commands:
        arguments = shlex.split(command)[1:]
        verb = arguments[0]
        if verb == "serve":  # does not end by itself: tests/serve starts it
            continue
        if verb == "run":
            assert arguments[1] == "configs/demo.yaml"
            recipe = Path("demo.yaml")
            recipe.write_text(_quick_recipe(ROOT / arguments[1]), encoding="utf-8")
            arguments[1] = str(recipe)
        assert run([*arguments, *_QUICK.get(verb, [])]) == 0, command
        assert "teal: " not in capsys.readouterr().err, command


def test_tutorial_python(smollm2_run: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tutorial's Python for transformers alone, with the folder that it names in place."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "from_pretrained" in block]
    folder = "runs/smollm2-135m/fisher-site-0.50"
    assert folder in block
    scope: dict[str, object] = {}
    exec(compile(block.replace(folder, str(exported)), "tutorial.md", "exec"), scope)  # noqa: S102
    assert isinstance(scope["text"], str)
    assert len(scope["text"]) > 20
