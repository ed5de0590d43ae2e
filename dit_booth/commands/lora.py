"""Exchange LoRA files with diffusers and PEFT.

    dit-booth lora export runs/lora-unet-0a1b2c3d --out lora.safetensors
    dit-booth lora import lora.safetensors --out adapter.safetensors --config videobooth_unet --set weights=SD_FOLDER

What is exported, `load_lora_weights` of a diffusers pipeline takes; what is imported, `dit_booth.load` and
`--strategy-weights` do. `dit-booth lora import --help` and so on tell the options; docs/lora.md, the names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dit_booth.commands.program import run_program, run_subcommand


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    source: Annotated[str, tyro.conf.Positional]
    """A run's folder with `lora` in its strategy, or its strategy.safetensors."""
    out: str
    """File to write (.safetensors)."""


@dataclass(frozen=True, kw_only=True)
class ImportArguments:
    file: Annotated[str, tyro.conf.Positional]
    """LoRA of diffusers, PEFT or kohya (.safetensors)."""
    out: str
    """Adapter to write (.safetensors)."""
    config: str = "demo"
    """Run that the adapter belongs to: a YAML file, or the name of one."""
    set: tuple[str, ...] = ()
    """Settings of that run, such as backbone=unet weights=stable-diffusion-v1-4 clip.pretrained=openai."""


def main(argv: Sequence[str], prog: str | None = None) -> int:
    """0: written; 1: an error, said in one line; 2: no such subcommand."""
    return run_subcommand(KINDS, argv, prog=prog or "dit-booth lora", description=__doc__)


def run_export(argv: Sequence[str], prog: str) -> int:
    """Write an adapter's LoRA for diffusers."""
    about = "Write the LoRA of a run's adapter as diffusers and PEFT read it."
    return run_program(ExportArguments, exported, argv, prog=prog, description=about)


def run_import(argv: Sequence[str], prog: str) -> int:
    """Write a LoRA of diffusers as an adapter."""
    about = "Write a LoRA of diffusers or PEFT as an adapter."
    return run_program(ImportArguments, imported, argv, prog=prog, description=about)


def exported(arguments: ExportArguments) -> Iterator[str]:
    """Export, and iterate over lines about it. ValueError: see `export_lora`."""
    from dit_booth.lora import export_lora

    yield from export_lora(arguments.source, safetensors(arguments.out))


def imported(arguments: ImportArguments) -> Iterator[str]:
    """Import, and iterate over lines about it. ValueError: see `import_lora`."""
    from dit_booth.commands.sample import nested
    from dit_booth.lora import import_lora

    out = safetensors(arguments.out)
    yield from import_lora(arguments.file, out, arguments.config, nested(arguments.set))
    yield f"load it         dit_booth.load({str(out)!r})"


def safetensors(out: str) -> Path:
    """Return the path to write. ValueError: it has another suffix."""
    path = Path(out)
    if path.suffix != ".safetensors":
        raise ValueError(f"--out is {out!r}; name a file that ends in .safetensors")
    return path


KINDS: dict[str, Callable[[Sequence[str], str], int]] = {"export": run_export, "import": run_import}
