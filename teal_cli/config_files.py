"""From flags and YAML files to checked configurations (`teal_cli.config`).

A YAML file may hold keys of several verbs. A key at its top goes to every verb that has it; a key
under a verb's name goes to that verb alone and beats the top. A flag beats the file, the file the
packaged default.yaml, that the defaults of the fields.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from teal_cli.config import (
    DEFAULT_STAGES,
    OTHER_SPELLINGS,
    STAGE_CONFIGS,
    STAGES,
    VERB_CONFIGS,
    CalibrateConfig,
    OutputConfig,
    RunConfig,
    SharedConfig,
    SparseConfig,
)
from teal_cli.errors import UsageError, nearest, shortened, shown
from teal_cli.reading import read_yaml
from teal_cli.resources import CONFIGS


def flag_name(key: str) -> str:
    """The flag of a key: max_new_tokens -> --max-new-tokens."""
    return "--" + key.replace("_", "-")


def keys_of(model: type[BaseModel]) -> dict[str, str]:
    """Outside name (YAML key) of each field -> the field's name."""
    return {field.alias or name: name for name, field in model.model_fields.items()}


C = TypeVar("C", bound=OutputConfig)
_OF_AN_EXPORT = {"sparsity", "calibration", "allocation", "limits", "cost", "recalibrate"}
"""Keys that say which export a later stage measures."""
_MOST_PROBLEMS = 5
"""In one line; a YAML file may have thousands."""
_LONGEST_KEY = 80
_LONGEST_MESSAGE = 300


def build(model: type[C], values: Mapping[str, Any], blamed: Mapping[str, str] | None = None) -> C:
    """Check values against a verb's model.

    Args:
        model: the verb's configuration.
        values: outside key -> value.
        blamed: key -> the file that it came from.

    Raises:
        UsageError: one line naming key, flag and the nearest valid name.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UsageError(_explain(error, model, blamed or {})) from error


def _explain(error: ValidationError, model: type[BaseModel], blamed: Mapping[str, str]) -> str:
    parts = []
    files: set[str] = set()
    problems = error.errors(include_url=False)
    for problem in problems[:_MOST_PROBLEMS]:
        key = str(problem["loc"][0]) if problem["loc"] else ""
        files |= {blamed[key]} if key in blamed else set() if key else set(blamed.values())
        message = shortened(problem["msg"].removeprefix("Value error, "), _LONGEST_MESSAGE)
        if problem["type"] == "extra_forbidden":
            parts.append(_unknown(key, "", keys_of(model)))
        elif key:
            message = message[0].lower() + message[1:]
            parts.append(f"{key} (flag {flag_name(key)}): {message}, got {shown(problem['input'])}")
        else:
            parts.append(message)
    if len(problems) > _MOST_PROBLEMS:
        parts.append(f"and {len(problems) - _MOST_PROBLEMS:,} more")
    return "".join(f"{file}: " for file in sorted(files)) + "; ".join(parts)


def _unknown(key: object, where: str, known: Iterable[str]) -> str:
    name = shortened(str(key), _LONGEST_KEY)
    return f"unknown key {name!r}{where}{nearest(name, known)}"


def _one_spelling(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Values by the names that configurations have, whichever spelling was given.

    Raises:
        UsageError: both spellings of one key.
    """
    names = {other: key for key, other in OTHER_SPELLINGS.items()}
    for other, key in names.items():
        if other in values and key in values:
            raise UsageError(
                f"{where}{other} (flag {flag_name(other)}) is another spelling of {key} (flag {flag_name(key)}): "
                "give one of the two"
            )
    return {names.get(key, key): value for key, value in values.items()}


def _values_for(verb: str, content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """What a YAML file says to one verb; every key of the file is checked against some verb."""
    content = {
        key: _one_spelling(value, f"{origin} ({key}): ") if key in VERB_CONFIGS and isinstance(value, dict) else value
        for key, value in _one_spelling(content, f"{origin}: ").items()
    }
    known = set().union(*(keys_of(model) for model in VERB_CONFIGS.values())) | {"stages"}
    for key, value in content.items():
        if key in VERB_CONFIGS:
            if not isinstance(value, dict):
                raise UsageError(f"{origin}: {key!r} must hold a mapping of {key} options")
        elif key not in known:
            raise UsageError(f"{origin}: {_unknown(key, '', known | set(VERB_CONFIGS))}")
    for section, model in VERB_CONFIGS.items():
        for key in content.get(section, {}):
            if key not in keys_of(model):
                raise UsageError(f"{origin}: {_unknown(key, f' in {section}', keys_of(model))}")
    own = keys_of(VERB_CONFIGS[verb])
    shared = {key: value for key, value in content.items() if key in own and key not in VERB_CONFIGS}
    return shared | dict(content.get(verb, {}))


def load_verb(verb: str, flags: Mapping[str, Any], config_file: Path | None) -> OutputConfig:
    """The configuration of one verb: flags over the YAML file over the default recipe over defaults.

    Args:
        verb: a name in VERB_CONFIGS.
        flags: outside key -> value, only those that were given.
        config_file: the user's YAML, or None.
    """
    model, flags = VERB_CONFIGS[verb], _one_spelling(flags)
    values = _values_for(verb, read_yaml(CONFIGS / "default.yaml"), "default.yaml")
    content = {} if config_file is None else read_yaml(config_file)
    own = _values_for(verb, content, str(config_file))
    blamed = {key: str(config_file) for key in own if key not in flags}
    config = build(model, values | own | dict(flags), blamed)
    if isinstance(config, SparseConfig):
        config._calibrate = build(CalibrateConfig, _values_for("calibrate", content, str(config_file)))
    return config


def load_as(model: type[C], verb: str, flags: Mapping[str, Any], config_file: Path | None = None) -> C:
    """As `load_verb`, for a verb whose configuration the caller knows."""
    config = load_verb(verb, flags, config_file)
    if not isinstance(config, model):
        raise TypeError(f"{verb} is configured by {type(config).__name__}, not {model.__name__}")
    return config


def recipe_names() -> list[str]:
    """The packaged recipes."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "default")


def find_recipe(named: Path) -> Path:
    """The file of a recipe: `named` itself, or the packaged one of this name, where there is no such file."""
    is_packaged = str(named) in recipe_names() and not named.exists()
    return CONFIGS / f"{named}.yaml" if is_packaged else named


def load_recipe(path: Path, flags: Mapping[str, Any]) -> RunConfig:
    """Every stage of a recipe, checked before the first one starts.

    Args:
        path: YAML, or the name of a packaged recipe.
        flags: outside key -> value, only those that were given.

    Raises:
        UsageError: anything wrong in the file, or stages that name different models.
    """
    path, flags = find_recipe(path), _one_spelling(flags)
    content = read_yaml(path, "recipe")
    # At the top, these two speak of the whole run; under a stage's name, of that stage.
    own = {key: content.pop(key) for key in ("json", "quiet") if key in content}
    whole = build(OutputConfig, own | {key: flags[key] for key in ("json", "quiet") if key in flags})
    wanted = content.get("stages", list(DEFAULT_STAGES))
    if not isinstance(wanted, list) or not wanted:
        raise UsageError(f"{path}: stages must be a list out of {', '.join(STAGES)}")
    for stage in wanted:
        if stage not in STAGES:
            raise UsageError(
                f"{path}: unknown stage {shown(stage)}{nearest(stage if isinstance(stage, str) else '', STAGES)}"
            )
    if "adapt" in wanted and "export" in wanted:
        raise UsageError(f"{path}: stages adapt and export exclude one another: adapt writes a checkpoint of its own")
    ordered = [stage for stage in STAGES if stage in wanted]
    defaults = read_yaml(CONFIGS / "default.yaml")
    stages: dict[str, SharedConfig] = {}
    for stage in ordered:
        model = STAGE_CONFIGS[stage]
        values = _values_for(stage, defaults, "default.yaml") | _values_for(stage, content, str(path))
        if stage != "export" and "export" in stages:  # measure what was exported; bench has sparsities of its own
            inherited = _OF_AN_EXPORT - ({"sparsity"} if stage == "bench" else set())
            values = stages["export"].model_dump(include=inherited, exclude_unset=True) | values
        own_flags = {key: flags[key] for key in flags if key in keys_of(model) and key not in ("json", "quiet")}
        stages[stage] = build(model, values | own_flags, dict.fromkeys(values, f"{path} ({stage})"))
        made, calibrate = stages[stage], stages.get("calibrate")
        if isinstance(made, SparseConfig) and isinstance(calibrate, CalibrateConfig):
            made._calibrate = calibrate  # for what has to be calibrated besides
        if getattr(stages[stage], "out", None) is not None:
            raise UsageError(f"{path} ({stage}): a recipe keeps everything under RUNS/<model>: leave out 'out'")
    for key in ("model", "runs", "device", "dtype"):
        if len({getattr(config, key) for config in stages.values()}) > 1:
            raise UsageError(f"{path}: the stages of one recipe must agree on {key!r}")
    return RunConfig(stages=stages, json_file=whole.json_file, quiet=whole.quiet)
