"""The console script ``dit-booth``: one program, a subcommand for each thing to do."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import NamedTuple

from dit_booth.errors import suggest


class Command(NamedTuple):
    """A subcommand: the module whose ``main(argv, prog)`` it calls, and the name of its arguments' class there."""

    module: str
    arguments: str
    help: str
    example: str


COMMANDS = {
    "run": Command(
        "dit_booth.run",
        "",
        "train a strategy's stages, sample, measure",
        "dit-booth run --strategy kv_concat --stages.fine.steps 500",
    ),
    "sample": Command(
        "dit_booth.commands.sample",
        "SampleArguments",
        "sample from a run or the embedded pipeline",
        'dit-booth sample toyworld --image star.png --caption "a star is spinning on snow" --subject star',
    ),
    "data": Command(
        "dit_booth.commands.data",
        "BuildSettings",
        "build a data set of your videos, inspect it, encode it once",
        "dit-booth data build --videos DIR --captions FILE --out DATA --segment.folder MASKS",
    ),
    "personalise": Command(
        "dit_booth.commands.personalise",
        "PersonaliseArguments",
        "learn one subject from an image of yours",
        "dit-booth personalise --method dreambooth --image cat.png --class cat",
    ),
    "sweep": Command(
        "dit_booth.commands.sweep",
        "SweepArguments",
        "run a study, each shared stage once",
        "dit-booth sweep schedule --dry-run",
    ),
    "compare": Command(
        "dit_booth.commands.compare",
        "CompareArguments",
        "compare systems at one budget per subject",
        "dit-booth compare --budget 60s --subjects 12 --out runs/compare",
    ),
    "evaluate": Command(
        "dit_booth.commands.evaluate",
        "EvaluateArguments",
        "score a run's videos, or a folder of videos of any tool",
        "dit-booth evaluate mine/videos.csv --weights dino=dino.pth",
    ),
    "report": Command(
        "dit_booth.commands.report",
        "ReportArguments",
        "make a page, CSV and LaTeX of runs or a study",
        "dit-booth report runs/sweeps/schedule",
    ),
    "study": Command(
        "dit_booth.commands.study",
        "StudyArguments",
        "ask people: a page of pairs, answers, analysis",
        "dit-booth study make runs/a runs/b --out studies/first",
    ),
    "lora": Command(
        "dit_booth.commands.lora",
        "ImportArguments",
        "exchange LoRA files with diffusers and PEFT",
        "dit-booth lora export runs/RUN --out lora.safetensors",
    ),
    "strategies": Command(
        "dit_booth.commands.strategies",
        "StrategiesArguments",
        "list injection strategies",
        'dit-booth strategies "*kv*"',
    ),
    "models": Command(
        "dit_booth.commands.models", "ModelsArguments", "list models", 'dit-booth models "dit-*"'
    ),
    "describe": Command(
        "dit_booth.commands.describe",
        "",
        "count parameters and FLOPs of a run's network",
        "dit-booth describe --dit.size XL --strategy kv_concat",
    ),
}
SHELLS = ("bash", "zsh", "tcsh")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status; 2: there is no such subcommand."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"dit-booth {version('dit-booth')}")
        return 0
    if name == "completion":
        return print_completion(words[1:])
    if name not in COMMANDS:
        print(f"error: {name!r} is no command{suggest(name, [*COMMANDS, 'completion'])}", file=sys.stderr)
        return 2
    status: int = import_module(COMMANDS[name].module).main(words[1:], prog=f"dit-booth {name}")
    return status


def usage() -> str:
    """Return the help text of the program: each subcommand with an example."""
    lines = ["usage: dit-booth COMMAND [OPTIONS]", "", "Subject-driven video diffusion.", ""]
    for name, command in COMMANDS.items():
        lines += [f"  {name:13}{command.help}", f"{'':15}{command.example}"]
    lines += [f"  {'completion':13}print a script that completes options in your shell: {', '.join(SHELLS)}"]
    lines += [f"{'':15}dit-booth completion bash > ~/.local/share/bash-completion/completions/dit-booth", ""]
    return "\n".join([*lines, "`dit-booth COMMAND --help` tells a command's options. `dit-booth --version`."])


def print_completion(words: Sequence[str]) -> int:
    """Print a shell's completion script over all subcommands and their options."""
    import tyro

    from dit_booth.config import RunConfig
    from dit_booth.config.parse import config_class

    if len(words) != 1 or words[0] not in SHELLS:
        print(f"error: completion {' '.join(words)}: name one of {', '.join(SHELLS)}", file=sys.stderr)
        return 2
    run = config_class(RunConfig.strategy)
    kinds = {
        name: getattr(import_module(command.module), command.arguments) if command.arguments else run
        for name, command in COMMANDS.items()
    }
    tyro.extras.subcommand_cli_from_dict(kinds, prog="dit-booth", args=["--tyro-print-completion", words[0]])
    return 0
