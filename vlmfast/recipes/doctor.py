"""`vlmfast doctor`: what runs on this machine, and the reason for what does not."""

from __future__ import annotations

import importlib
import json
import pkgutil
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from vlmfast import _ext, backend, ops
from vlmfast._version import __version__
from vlmfast.bench.machine import machine


@dataclass
class Config:
    """Says what runs on this machine, and the reason for what does not.

    For example:
        vlmfast doctor
        vlmfast doctor --json > machine.json
    """

    json: bool = False
    """Print one JSON object, for a script or a bug report."""


def run(config: Config) -> None:
    """Prints the diagnosis.

    Args:
        config: the flags.
    """
    found = diagnose()
    print(json.dumps(found, indent=2) if config.json else render(found))


def diagnose() -> dict[str, Any]:
    """Versions, devices, the extension, each op's backends and the optional libraries, ready for JSON.

    Returns: {"versions": {name: version}, "devices": {name: what it is}, "extension": {...},
        "ops": {family: {device: {backend: "runs" or the reason}}}, "extras": {extra: {library: version or "missing"}}}.
    """
    devices = {"cpu": f"{machine()['cpu']}, {torch.get_num_threads()} threads"}
    devices |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    families = {name: importlib.import_module(f"vlmfast.ops.{name}") for name in _families()}
    return {
        "versions": {
            "vlmfast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": metadata.version("numpy"),
            "platform": platform.platform(),
        },
        "devices": devices,
        "extension": _extension(),
        "forced_backend": backend.forced_backend(),
        "ops": {
            name: {device: _backends(family.IMPLS, device) for device in devices} for name, family in families.items()
        },
        "extras": _extras(),
    }


def render(found: dict[str, Any]) -> str:
    """The diagnosis as text.

    Args:
        found: what `diagnose` returned.
    Returns: one heading and its lines for each entry.
    """
    lines = ["versions", *(f"  {name:<10} {version}" for name, version in found["versions"].items())]
    lines += ["devices", *(f"  {name:<10} {what}" for name, what in found["devices"].items())]
    extension = found["extension"]
    sets = f"{extension['isa']} (of {', '.join(extension['isas'])})" if extension["loaded"] else extension["reason"]
    lines += ["extension", f"  {'runs' if extension['loaded'] else 'missing':<10} {sets}", "ops"]
    if found["forced_backend"]:
        lines.append(f"  VLMFAST_BACKEND forces {found['forced_backend']}")
    for name, devices in found["ops"].items():
        for device, backends in devices.items():
            lines.append(f"  {name} on {device}")
            lines += [f"    {backend_name:<10} {state}" for backend_name, state in backends.items()]
    lines.append("extras")
    for extra, libraries in found["extras"].items():
        lines.append(f"  {extra:<10} " + ", ".join(f"{library} {version}" for library, version in libraries.items()))
    return "\n".join(lines)


def _families() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(ops.__path__) if not module.name.startswith("_"))


def _backends(impls: Any, device: str) -> dict[str, str]:
    # Every family so far takes two matrices; `unsupported` looks at device, dtype and shape only.
    sample = torch.empty(8, 16, device=device)
    return backend.explain(impls, sample, sample)


def _extension() -> dict[str, Any]:
    if _ext.C is None:
        return {"loaded": False, "reason": _ext.reason, "isa": None, "isas": []}
    return {"loaded": True, "reason": "", "isa": _ext.C.isa(), "isas": list(_ext.C.isas())}


def _extras() -> dict[str, dict[str, str]]:
    """Each extra of the installed package -> its libraries' versions; empty when vlmfast is not installed."""
    try:
        requirements = metadata.requires("vlmfast") or []
    except metadata.PackageNotFoundError:
        return {}
    extras: dict[str, dict[str, str]] = {}
    for requirement in requirements:
        if (extra := re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)) and not requirement.startswith("vlmfast"):
            library = re.split(r"[^\w.-]", requirement)[0]
            extras.setdefault(extra.group(1), {})[library] = _version(library)
    return extras


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "missing"
