"""Configuration: precedence, and mistakes that name key, flag and nearest name."""

import os
from pathlib import Path

import pytest
import yaml

from teal_cli.config import DEFAULT_STAGES, OTHER_SPELLINGS, VERB_CONFIGS, EvalConfig, GenerateConfig
from teal_cli.config_files import flag_name, keys_of, load_recipe, load_verb, recipe_names
from teal_cli.errors import UsageError
from teal_cli.models.aliases import alias_names, find_alias
from teal_cli.resources import CONFIGS


def _file(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_flags_beat_yaml_beats_default(tmp_path: Path) -> None:
    path = _file(tmp_path, {"seed": 3, "top_p": 0.5, "temperature": 1.0, "generate": {"top_p": 0.7}})
    config = load_verb("generate", {"seed": "9"}, path)
    assert isinstance(config, GenerateConfig)
    assert (config.seed, config.top_p, config.temperature, config.top_k) == (9, 0.7, 1.0, 0)
    assert config.model == "smollm2-135m"  # from the default recipe


def test_top_keys_go_to_every_verb_and_sections_to_one(tmp_path: Path) -> None:
    path = _file(tmp_path, {"sparsity": 0.3, "bench": {"sparsity": [0.1, 0.2]}, "calibrate": {"tokens": 2048}})
    assert load_verb("export", {}, path).sparsity == 0.3
    assert load_verb("bench", {}, path).sparsity == [0.1, 0.2]
    assert load_verb("calibrate", {}, path).tokens == 2048


@pytest.mark.parametrize("value", ["0.4,0.5", [0.4, 0.5]])
def test_lists_from_flags_and_yaml(value: object) -> None:
    assert load_verb("bench", {"sparsity": value}, None).sparsity == [0.4, 0.5]
    assert load_verb("bench", {"sparsity": 0.4}, None).sparsity == [0.4]


@pytest.mark.parametrize(
    ("verb", "flags", "message"),
    [
        ("export", {"sparsty": "0.5"}, r"unknown key 'sparsty'; did you mean 'sparsity'\?"),
        ("export", {"sparsity": "half"}, r"sparsity \(flag --sparsity\): input should be a valid number"),
        ("export", {"sparsity": "1.0"}, "below 1"),
        ("export", {"sparsity": "-0.1"}, "at least 0"),
        ("export", {"sparsity": "nan"}, "at least 0"),
        ("export", {"weights": "symlink"}, "'link' or 'copy'"),
        ("export", {"allocation": "fischer"}, "did you mean 'fisher'"),
        ("export", {"allocation": "mine.yaml"}, "allocation file 'mine.yaml': there is no such file"),
        ("eval", {"allocation": "fisher,gready"}, "did you mean 'greedy'"),
        ("export", {"allocation": "uniform", "limits": "*=0:0.5"}, "--limits.*for allocation fisher"),
        ("export", {"limits": "*=0.6:0.5"}, "is not least:most"),
        ("export", {"limits": "*"}, r"limits \(flag --limits\)"),
        ("export", {"cost": "nowhere.json"}, "no such file"),
        ("eval", {"generate": True, "prompt_tokens": "1024"}, "--prompt-tokens.*less than seq_len"),
        ("bench", {"sparsity": "0.5,1.5"}, "below 1"),
        ("bench", {"random_weights": True, "calibration": "runs/x"}, "--random-weights.*leave out calibration"),
        ("generate", {"top_k": "5"}, "--top-k.*need a temperature above 0"),
        ("generate", {"top_p": "0"}, r"top_p \(flag --top-p\)"),
        ("generate", {"max_new_tokens": "0"}, "--max-new-tokens"),
        ("calibrate", {"tokens": "100", "seq_len": "200"}, "less than one sequence"),
        ("calibrate", {"seq_len": "8", "sink_tokens": "8"}, "--sink-tokens.*leaves nothing"),
        ("eval", {"dense_prefix": "1023"}, "leaves no sparse position"),
        ("eval", {"task_limit": "3"}, "need tasks"),
        ("eval", {"text": "a.txt", "dataset": "sotu"}, "not both"),
        ("generate", {"temperature": "1e-9"}, "at least 0.01"),
        ("generate", {"stop": "a,,b"}, r"stop \(flag --stop\)"),
        ("export", {"json": "."}, r"json \(flag --json\): this is a folder"),
        ("export", {"json": "/dev/full"}, r"json \(flag --json\): this is no ordinary file"),
        ("inspect", {"json": "/proc/r.json"}, r"json \(flag --json\): it cannot be written in /proc"),
        ("report", {"plots": "/dev/null/plots"}, r"plots \(flag --plots\): it cannot be written"),
        ("calibrate", {"out": "x" * 300}, r"out \(flag --out\): it cannot be written \(File name too long\)"),
        ("export", {"cost": "x" * 300}, r"cost \(flag --cost\): it cannot be read \(File name too long\)"),
        ("export", {"cost": "/dev/zero"}, r"cost \(flag --cost\): this is no ordinary file"),
        ("calibrate", {"runs": ""}, r"runs \(flag --runs\): this is empty"),
        ("calibrate", {"model": ""}, r"model \(flag --model\): this is empty"),
        ("calibrate", {"dataset": "a\0b"}, r"dataset \(flag --dataset\): there is a NUL in it"),
        ("generate", {"prompt": "caf\udce9"}, r"prompt \(flag --prompt\): this is not UTF-8"),
        ("calibrate", {"tokens": True}, r"tokens \(flag --tokens\): this is true or false"),
        ("bench", {"sparsity": [0.5, False]}, r"sparsity \(flag --sparsity\): this is true or false"),
        ("calibrate", {"seed": [[1]]}, r"seed \(flag --seed\): .*, got \[\[1\]\]"),
        ("bench", {"sparsity": ["a"] * 9}, r"; and 4 more$"),
        ("calibrate", {"device": "tpu"}, r"device \(flag --device\)"),
    ],
)
def test_mistakes_are_named(verb: str, flags: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_verb(verb, flags, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {"m" * 9_000: 1},
        {"export": {"m" * 9_000: 1}},
        {"export": {1: 2}},
        {"seed": "9" * 9_000},
        {"allocation": "a" * 9_000},
        {"limits": {"p" * 9_000: [2, 1]}},
        {"weights": ["x" * 9_000] * 99},
        {"stages": [["x" * 9_000]]},
    ],
)
def test_messages_are_short_whatever_the_values(tmp_path: Path, content: object) -> None:
    load = load_recipe if "stages" in content else lambda path, flags: load_verb("export", flags, path)
    with pytest.raises(UsageError) as caught:
        load(_file(tmp_path, content), {})
    assert len(str(caught.value)) < 1_500


def test_a_pipe_is_no_recipe() -> None:
    """It would be waited for."""
    os.mkfifo("pipe")
    for path in (Path("pipe"), Path("/dev/zero")):
        with pytest.raises(UsageError, match=f"recipe {path} is not an ordinary file"):
            load_recipe(path, {})
        with pytest.raises(UsageError, match=f"config file {path} is not an ordinary file"):
            load_verb("export", {}, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sparstiy": 0.5}, r"c.yaml: unknown key 'sparstiy'; did you mean 'sparsity'\?"),
        ({"export": {"tokens": 5}}, "c.yaml: unknown key 'tokens' in export"),
        ({"eval": {"bogus": 5}}, "c.yaml: unknown key 'bogus' in eval"),
        ({"export": 5}, "must hold a mapping"),
        ({"sparsity": [0.5]}, "c.yaml: sparsity"),
        ("a: [", "not valid YAML"),
        ("- a", "must be a mapping"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_yaml_mistakes_blame_the_file(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_verb("export", {}, _file(tmp_path, content))


def test_a_flag_may_complete_what_the_file_says(tmp_path: Path) -> None:
    path = _file(tmp_path, {"tokens": 512})
    with pytest.raises(UsageError, match=r"c.yaml: tokens \(512.*less than one sequence"):
        load_verb("calibrate", {}, path)
    assert load_verb("calibrate", {"seq_len": "256"}, path).tokens == 512
    with pytest.raises(UsageError, match=r"^sparsity"):
        load_verb("export", {"sparsity": "2"}, _file(tmp_path, {"sparsity": 0.5}))


def test_missing_config_file() -> None:
    with pytest.raises(UsageError, match=r"nowhere.yaml does not exist"):
        load_verb("export", {}, Path("nowhere.yaml"))


def test_eval_prefix_defaults_to_half() -> None:
    assert EvalConfig(seq_len=1024).prefixes == [512]
    assert EvalConfig(seq_len=1024, dense_prefix="4,512").prefixes == [4, 512]


def test_recipe_checks_every_stage_before_the_first(tmp_path: Path) -> None:
    path = _file(tmp_path, {"stages": ["export", "calibrate"], "generate": {"prompt": "hi"}})
    assert list(load_recipe(path, {}).stages) == ["calibrate", "export"]
    with pytest.raises(UsageError, match=r"\(bench\): repeats"):
        load_recipe(_file(tmp_path, {"bench": {"repeats": 0}}), {})
    with pytest.raises(UsageError, match="unknown stage 'evl'; did you mean 'eval'"):
        load_recipe(_file(tmp_path, {"stages": ["evl"]}), {})
    with pytest.raises(UsageError, match="must agree on 'model'"):
        load_recipe(_file(tmp_path, {"bench": {"model": "llama-3-8b"}}), {})


def test_recipe_json_quiet_and_out(tmp_path: Path) -> None:
    recipe = load_recipe(_file(tmp_path, {"json": "all.json", "quiet": True, "bench": {"json": "b.json"}}), {})
    assert (recipe.json_file, recipe.quiet) == (Path("all.json"), True)
    assert recipe.stages["bench"].json_file == Path("b.json")
    assert recipe.stages["eval"].json_file is None
    with pytest.raises(UsageError, match="leave out 'out'"):
        load_recipe(_file(tmp_path, {"calibrate": {"out": "x"}}), {})


def test_recipe_measures_what_it_exports(tmp_path: Path) -> None:
    stages = load_recipe(_file(tmp_path, {"export": {"sparsity": 0.4}, "generate": {"prompt": "x"}}), {}).stages
    assert stages["eval"].sparsity == [stages["generate"].sparsity] == [0.4]
    assert stages["eval"].allocation == [stages["export"].allocation] == ["fisher"]
    export = {"limits": {"*.0.*": [0, 0.3]}, "recalibrate": False}
    stages = load_recipe(_file(tmp_path, {"export": export, "generate": {"prompt": "x"}}), {}).stages
    assert stages["eval"].limits == stages["generate"].limits == stages["bench"].limits == {"*.0.*": (0.0, 0.3)}
    assert (stages["eval"].recalibrate, stages["generate"].recalibrate) == (False, False)
    stages = load_recipe(_file(tmp_path, {"export": {"sparsity": 0.4}, "eval": {"sparsity": 0.2}}), {}).stages
    assert stages["eval"].sparsity == [0.2]


@pytest.mark.parametrize(("key", "other"), OTHER_SPELLINGS.items())
def test_keys_have_two_spellings(key: str, other: str, tmp_path: Path) -> None:
    """As flags, at the top of a YAML file and under a verb's name; both at once are an error that names the two."""
    verb = "calibrate" if key == "quantise_tokens" else "bench"
    values = {"quantise_tokens": 7, "recalibrate": False, "quantise_output": True, "also_quantise": ["int8"]}
    wanted = {"quantise": "int4", **{key: values.get(key, "int4")}}
    rest: dict[str, object] = {name: value for name, value in wanted.items() if name != key}
    given = {other: wanted[key]}

    def found(flags: dict[str, object], file: dict[str, object]) -> object:
        return getattr(load_verb(verb, flags, _file(tmp_path, file)), key)

    as_flag = found(rest | given, {})
    assert as_flag == found(wanted, {}) == found({}, rest | given) == found({}, {**rest, verb: given})
    assert as_flag != getattr(load_verb(verb, {}, None), key)
    for both in (wanted | given, {verb: wanted | given}):
        with pytest.raises(UsageError, match=f"{other} .*is another spelling of {key} .*give one of the two"):
            found({}, both)
    with pytest.raises(UsageError, match=f"^{other} "):
        found(wanted | given, {})
    # A flag beats the file, whichever spelling each of them has.
    if key == "quantise":
        assert str(found({other: "int8"}, wanted)) == str(found({key: "int8"}, given)) == "int8"


def test_stop_tokens_may_be_blanks(tmp_path: Path) -> None:
    assert load_verb("generate", {"stop": "\n"}, None).stop == ["\n"]
    assert load_verb("generate", {}, _file(tmp_path, {"stop": [",", " "]})).stop == [",", " "]


def test_recipe_flags_reach_every_stage(tmp_path: Path) -> None:
    recipe = load_recipe(_file(tmp_path, {"seed": 1}), {"seed": "7", "runs": "elsewhere"})
    assert list(recipe.stages) == list(DEFAULT_STAGES)
    assert {config.seed for config in recipe.stages.values()} == {7}
    assert {config.runs for config in recipe.stages.values()} == {Path("elsewhere")}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_packaged_recipes_are_valid(path: Path) -> None:
    if path.name != "default.yaml":
        load_recipe(path, {})
    for verb in VERB_CONFIGS:
        load_verb(verb, {}, path)


def test_packaged_recipes_by_name_unless_a_file_is_called_so() -> None:
    assert recipe_names() == [
        "adapt-demo",
        "adapt-drelu-llama-3-8b",
        "adapt-gpu",
        "adapt-llama-3-8b",
        "adapt-lte",
        "adapt-prosparse",
        "demo",
        "laptop",
        "llama-3-70b",
        "llama-3-8b",
    ]
    assert load_recipe(Path("laptop"), {}).stages["generate"].model == "qwen2.5-0.5b"
    seventy = load_recipe(Path("llama-3-70b"), {}).stages
    assert list(seventy) == ["calibrate", "export", "generate"]
    assert (seventy["calibrate"].offload, seventy["generate"].quantisation) == (True, "int8")
    Path("laptop").write_text("model: mine\ngenerate: {prompt: x}\n")
    assert load_recipe(Path("laptop"), {}).stages["generate"].model == "mine"
    with pytest.raises(UsageError, match="recipe desktop does not exist"):
        load_recipe(Path("desktop"), {})


def test_aliases_build_the_model_they_name() -> None:
    """Parameter counts as published, from the shapes alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    expected = {
        "smollm2-135m": 0.1345,
        "llama-2-7b": 6.74,
        "llama-2-13b": 13.02,
        "llama-2-70b": 68.98,
        "llama-3-8b": 8.03,
        "llama-3-70b": 70.55,
        "llama-3.1-8b": 8.03,
        "llama-3.2-1b": 1.236,
        "llama-3.2-3b": 3.213,
        "mistral-7b": 7.24,
        "qwen2.5-0.5b": 0.494,
        "qwen2.5-7b": 7.62,
        "qwen3-0.6b": 0.596,
        "qwen3-8b": 8.19,
        "qwen3-30b-a3b": 30.53,
        "mixtral-8x7b": 46.70,
        "phi-4-mini": 3.836,
        "phi-2": 2.78,
        "gemma-2-2b": 2.614,
        "gemma-3-4b": 3.880,  # of its text
        "olmo-2-7b": 7.299,
        "command-r7b": 8.028,
        "starcoder2-3b": 3.030,
        "pythia-6.9b": 6.857,
        "glm-4-9b": 9.40,
        "granite-3.3-8b": 8.17,
        "opt-6.7b": 6.658,
        "smollm3-3b": 3.075,
        "minitron-4b": 4.19,
        "gpt-oss-20b": 20.91,
    }
    assert set(alias_names()) == set(expected)
    for name, billions in expected.items():
        alias = find_alias(name)
        assert alias is not None
        shape = dict(alias.shape)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape))
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count / 1e9 == pytest.approx(billions, rel=0.005), name


def test_every_key_has_a_flag_and_a_description() -> None:
    for verb, model in VERB_CONFIGS.items():
        for key, field in keys_of(model).items():
            assert flag_name(key).startswith("--"), verb
            assert model.model_fields[field].description, f"{verb}: {key}"


def test_users_own_alias(tmp_path: Path) -> None:
    folder = Path("configs/models")
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("hub_id: me/mine\nshape: {model_type: llama}\n")
    (folder / "broken.yaml").write_text("hub: me/mine\n")
    assert "mine" in alias_names()
    with pytest.raises(UsageError, match=r"broken.yaml: hub_id: Field required"):
        find_alias("broken")
    assert find_alias("../models/mine") is None
