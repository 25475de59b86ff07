"""`teal info`."""

from pathlib import Path
from typing import Any

from teal_cli.cli.options import Flags, with_options
from teal_cli.cli.output import finish, prepare
from teal_cli.config import InfoConfig
from teal_cli.plain_table import PlainTable, facts_table


def _run(flags: Flags, config_file: Path | None) -> None:
    config, reporter = prepare(InfoConfig, "info", flags, config_file)
    from teal_cli.steps.info import machine, model_fit

    result = machine(config.device)
    if "model" in flags or config_file is not None:
        result["model"] = model_fit(config)
    finish(config, reporter, result, _tables)


def _tables(result: dict[str, Any]) -> list[PlainTable]:
    return [_machine(result), _backends(result), _model(result) if "model" in result else _aliases(result)]


def _gib(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _rows(title: str, rows: dict[str, str | None]) -> PlainTable:
    table = facts_table(title)
    for label, value in rows.items():
        if value is not None:
            table.add_row(label, value)
    return table


def _machine(result: dict[str, Any]) -> PlainTable:
    gpu = result["gpu"]
    rows: dict[str, str | None] = {
        "device": result["device"],
        "memory available": _gib(result["memory_available_bytes"]),
    }
    if gpu is None:
        rows["no GPU"] = result["no_gpu_because"]
    else:
        rows["compute capability"] = gpu["compute_capability"]
        rows["driver, CUDA"] = f"{gpu['driver'] or 'unknown'}, {gpu['cuda'] or 'none'}"
        whose = "this GPU" if gpu["tuned"] else "another GPU: `teal bench --kernels --tune`"
        if result["backends"]["triton"] == "available":
            rows["kernels"] = f"tile configs as measured on {whose}"
        rows["main memory available"] = _gib(result["main_memory_available_bytes"])
    if gpu is not None and result["c_compiler"] is None:
        rows["C compiler"] = "none: triton needs one to launch kernels (install gcc)"
    rows["native CPU library"] = _native(result["native"])
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    rows["converted models"] = result["teal_home"]
    rows["model types"] = ", ".join(result["architectures"])
    return _rows("Machine", rows)


def _native(found: dict[str, Any]) -> str:
    if found["variant"] is None:
        return f"none: {found['unavailable_because']}"
    others = [name for name in found["variants"] if name != found["variant"]]
    also = f" (also {', '.join(others)})" if others else ""
    return f"{found['variant']}{also}, {found['threads']} thread{'s' if found['threads'] > 1 else ''}"


def _backends(result: dict[str, Any]) -> PlainTable:
    table = PlainTable(f"Backends (auto takes {result['auto_backend']})", "backend", "here", figures=False)
    for name, state in result["backends"].items():
        table.add_row(name, state)
    return table


def _aliases(result: dict[str, Any]) -> PlainTable:
    table = PlainTable("Model aliases", "alias", "hub id", "without a hub", figures=False)
    for name, entry in result["aliases"].items():
        table.add_row(name, entry["hub_id"], "installed" if entry["packaged"] else "")
    return table


def _model(result: dict[str, Any]) -> PlainTable:
    """The model that was asked about: sizes, what fits, how it decodes."""
    model, where = result["model"], "on the GPU" if result["device_type"] == "cuda" else "in memory"
    verdict = {True: "fits", False: "too large", None: "unknown"}
    rows: dict[str, str | None] = {
        "model type": model["model_type"] + ("" if model["supported"] else ": not in the table (teal calibrate helps)"),
        "parameters": f"{model['parameters'] / 1e9:.2f} G, {model['projection_parameters'] / 1e9:.2f} G in projections",
    }
    for entry in model["weights"]:
        fit = f"{verdict[entry['fits_on_device']]} {where}"
        if result["device_type"] == "cuda":
            fit += f", {verdict[entry['fits_in_main_memory']]} in main memory"
        rows[entry["weights"]] = f"{_gib(entry['bytes'])}: {fit}"
    rows["runs as"] = _advice(model)
    if model["kind"] in ("causal", "seq2seq"):
        rows["KV cache"] = f"{_gib(1024 * model['cache_bytes_per_token'])} for 1,024 tokens, in {model['dtype']}"
        ours = {
            "compact": "fused decode path (our own kernels from end to end)",
            "native": "native decode path (a compiled token)",
        }
        rows["decodes by"] = ours.get(
            model["path"], f"transformers' forward, backend {result['auto_backend']} ({model['general_because']})"
        )
    return _rows(model["name"], rows)


def _advice(model: dict[str, Any]) -> str:
    kind = model["runs_as"]
    if kind is None:
        return "nothing: too large for this machine"
    if kind.startswith("int"):
        return f"{kind}: --quantise {kind} (if the dense weights do not fit: configs/llama-3-70b.yaml shows how)"
    return kind if kind == model["dtype"] else f"{kind}: --dtype {kind}"


command = with_options(InfoConfig, _run)
