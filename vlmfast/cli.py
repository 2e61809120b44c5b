"""The command line: `vlmfast <command> --flags`, one file in `vlmfast/recipes/` a command.

Each of those files has a dataclass `Config` (its fields are the flags, its docstring is the help) and `run(config)`.
With a name `POSITIONAL` in it, fields without a default are words without a flag.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from vlmfast._version import __version__
from vlmfast.errors import VlmfastError, missing_extra

COMMANDS = (
    "demo",
    "demo-vlm",
    "train --task",
    "train",
    "plan",
    "eval caption",
    "eval vqa",
    "eval pope",
    "eval calibration",
    "eval",
    "caption",
    "vqa",
    "chat",
    "embed",
    "search",
    "bench loss",
    "bench topk",
    "bench model",
    "bench report",
    "tune",
    "doctor",
    "data preview",
    "data export",
    "convert",
)


FAILURES = (VlmfastError, OSError, ValueError)  # what the library and the system raise on purpose; the rest are bugs


def main(args: Sequence[str] | None = None) -> int:
    """The exit status of the command line `args` (default: the process's own): 0 done, 1 failed, 2 misused.

    Args:
        args: words after `vlmfast`.
    Returns: 0, 1, 2, or 130 if interrupted. A failure is one line on stderr; VLMFAST_DEBUG=1 shows its traceback.
    Raises:
        Exception: what the command raised, unless it is one of FAILURES; those too when debugging.
    """
    words = list(sys.argv[1:] if args is None else args)
    command = _command(words)
    try:
        status = _top_level(words) if command is None else _run(command, _flags(command, words))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        return 0
    except FAILURES as error:
        if os.environ.get("VLMFAST_DEBUG") == "1":
            raise
        print(f"vlmfast {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"vlmfast {command}: interrupted", file=sys.stderr)
        return 130


def _command(words: list[str]) -> str | None:
    """The command that the words begin with, the longest if there are several."""
    if words[:1] == ["train"] and any(word.split("=")[0] == "--task" for word in words):
        return "train --task"
    return max((name for name in COMMANDS if words[: len(name.split())] == name.split()), key=len, default=None)


def _flags(command: str, words: list[str]) -> list[str]:
    """The words after the command; asked for help, nothing else counts."""
    flags = words[len(command.split(" --")[0].split()) :]
    return ["--help"] if "--help" in flags else flags


def _run(command: str, words: list[str]) -> int:
    """Parses the flags into the command's Config, refusing unknown ones with the nearest name, and runs it."""
    try:
        import tyro
    except ImportError:
        raise missing_extra("tyro", "cli") from None
    module = _module(command)
    positional = [tyro.conf.PositionalRequiredArgs] * hasattr(module, "POSITIONAL")
    try:
        config = tyro.cli(
            module.Config,
            prog=f"vlmfast {command.split(' --')[0]}",
            args=words,
            description=inspect.getdoc(module.Config),
            config=(tyro.conf.FlagCreatePairsOff, *positional),
        )
    except SystemExit as done:  # --help, or a flag that does not parse: tyro has printed it
        return int(done.code or 0)
    return int(module.run(config) or 0)


def _module(command: str) -> ModuleType:
    return importlib.import_module("vlmfast.recipes." + module_name(command))


def module_name(command: str) -> str:
    """The file in `vlmfast/recipes/` that a command runs, without its ending.

    Args:
        command: one of COMMANDS.
    """
    return {"train --task": "train_vlm"}.get(command) or command.replace(" ", "_").replace("-", "_")


def _top_level(words: list[str]) -> int:
    """Help, the version, or what the first words were probably meant to be."""
    if words[:1] == ["--version"]:
        print(__version__)
        return 0
    asked = not words or words[0] in ("-h", "--help")
    inside = [name for name in COMMANDS if words and name.startswith(words[0] + " ")]
    if asked or (inside and words[1:2] in ([], ["-h"], ["--help"])):
        print("usage: vlmfast <command> [--flags]     (vlmfast <command> --help: its flags, with an example)\n")
        for name in inside or COMMANDS:
            print(f"  {name:<13} {str(inspect.getdoc(_module(name).Config)).splitlines()[0]}")
        return 0 if words else 2
    wrong = " ".join(words[:2] if inside else words[:1])
    near = difflib.get_close_matches(wrong, COMMANDS, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'? " if near else ""
    print(f"vlmfast: unknown command '{wrong}'; {hint}commands: {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
