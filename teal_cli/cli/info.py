"""`teal info`."""

from pathlib import Path
from typing import Any

from rich.table import Table

from teal_cli.cli.options import Flags, with_options
from teal_cli.cli.output import prepare, write_result
from teal_cli.config import InfoConfig


def describe(device_name: str) -> dict[str, Any]:
    """Machine, libraries, backends and aliases, as data."""
    import torch

    from teal_cli.models.aliases import alias_names, find_alias
    from teal_cli.models.architectures import table
    from teal_cli.models.loading import available_bytes, pick_device
    from teal_cli.resources import teal_home
    from teal_cli.versions import device_description, library_versions
    from teal_kernels import BACKENDS, backend_unavailable_reason, resolve_backend

    device = pick_device(device_name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    aliases = {}
    for name in alias_names():
        alias = find_alias(name)
        if alias is not None:
            packaged = alias.packaged_file()
            aliases[name] = {"hub_id": alias.hub_id, "packaged": None if packaged is None else str(packaged)}
    return {
        "device": device_description(device),
        "device_type": device.type,
        "memory_available_bytes": available_bytes(device),
        "versions": library_versions(),
        "backends": {
            name: backend_unavailable_reason(name, device, dtype) or "available" for name in BACKENDS if name != "auto"
        },
        "auto_backend": resolve_backend("auto", device, dtype),
        "architectures": sorted(table()),
        "teal_home": str(teal_home()),
        "aliases": aliases,
    }


def _run(flags: Flags, config_file: Path | None) -> None:
    config, reporter = prepare(InfoConfig, "info", flags, config_file)
    result = describe(config.device)
    write_result(config, result)
    machine = Table(title="Machine", title_justify="left", show_header=False)
    memory = result["memory_available_bytes"]
    machine.add_row("device", result["device"])
    machine.add_row("memory available", "unknown" if memory is None else f"{memory / 2**30:.1f} GiB")
    machine.add_row("versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    machine.add_row("converted models", result["teal_home"])
    machine.add_row("model types", ", ".join(result["architectures"]))
    backends = Table("backend", "here", title=f"Backends (auto takes {result['auto_backend']})", title_justify="left")
    for name, state in result["backends"].items():
        backends.add_row(name, state)
    aliases = Table("alias", "hub id", "without a hub", title="Model aliases", title_justify="left")
    for name, entry in result["aliases"].items():
        aliases.add_row(name, entry["hub_id"], "installed" if entry["packaged"] else "")
    for table in (machine, backends, aliases):
        reporter.show(table)


command = with_options(InfoConfig, _run)
