"""Do two checkouts train the same? Runs the same short trainings on both and compares them bit for bit, on the CPU.

    python experiments/bench/same_as.py ../before                     # the full matrix
    python experiments/bench/same_as.py ../before --only dit-bank     # cases whose names contain this
    python experiments/bench/same_as.py . --other-flags="--train.seed 1" --only dit-bank-one    # a planted difference

A case is a backbone, strategies, and an engine: one process, or two ranks under ZeRO-2 or ZeRO-3. Losses and gradient
norms of every step must be the same floats, the tensors of both weight files the same bits. A pair of finished runs of
the same code and flags is compared without running it again. Exits 1 on any difference or failed run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import tyro
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TRAINING = (
    "--config experiments/configs/toyworld.yaml --weights embedded --data.size 12 --data.frames 3 --train.batch-size 4"
    " --train.clip 1.0 --stages.coarse.steps 20 --stages.fine.steps 20 --stages.coarse.warmup 5 --stages.fine.warmup 5"
    " --stages.fine.drop 0.3 --sample.videos 0"
)
STRATEGIES = {  # all of them but `none`; `shared` records a clean reference for two strategies at once
    "videobooth": "--strategy token_replacement+kv_concat",
    "bank": "--strategy token_bank --token-bank.source latent",
    "shared": "--strategy kv_concat+token_bank --kv-concat.reference-noise clean --token-bank.source latent",
    "adaln": "--strategy adaln+query_projection+in_context",
    "spatial": "--strategy spatial_concat+decoupled_attention",
}
ENGINES = {"one": "ds_config.json", "zero2": "zero2.json", "zero3": "zero3.json"}
FLOATS = ("loss", "aux_loss", "grad_norm", "lr")
OLDER_NAMES = {"penalty": "aux_loss"}
WEIGHTS = ("strategy.safetensors", "weights.safetensors")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    other: Annotated[Path, tyro.conf.Positional]
    """The other checkout, with an environment in which it is installed."""
    python: Path | None = None
    """Its interpreter; default: its .venv/bin/python if there, else this one."""
    only: tuple[str, ...] = ()
    """Cases whose names contain one of these; default: all."""
    out: Path = Path("runs/bench/same_as")
    """Folder of the runs and of the results (results.jsonl)."""
    again: bool = False
    """Run every case again."""
    other_flags: str = ""
    """Further flags of the other checkout's runs."""
    renamed: tuple[str, ...] = ()
    """Flags that the other checkout spells differently, as HERE=THERE (data.size=data.side)."""


@dataclass(frozen=True)
class Case:
    backbone: str
    strategies: str
    engine: str

    @property
    def name(self) -> str:
        return f"{self.backbone}-{self.strategies}-{self.engine}"

    def flags(self) -> list[str]:
        configs = ROOT if self.engine == "one" else ROOT / "experiments" / "configs" / "engines"
        engine = str(configs / ENGINES[self.engine])
        flags = f"--backbone {self.backbone} {STRATEGIES[self.strategies]} {TRAINING}"
        return [*flags.split(), "--ds-config", engine]


@dataclass(frozen=True)
class Checkout:
    """A working tree, its interpreter, and `state`: its commit and a hash of the changes to it."""

    root: Path
    python: Path
    state: str

    @classmethod
    def at(cls, root: Path, python: Path) -> Checkout:
        """ValueError: no git checkout, or an interpreter in which another checkout is installed."""
        probe = [str(python), "-P", "-c", "import dit_booth; print(dit_booth.__file__)"]
        found = Path(output_of(probe, root).strip()).resolve()
        if not found.is_relative_to(root):
            raise ValueError(
                f"{python} imports {found}, not {root}/dit_booth; give --python of its environment"
            )
        changes = output_of(["git", "diff", "HEAD"], root)
        commit = output_of(["git", "rev-parse", "--short=12", "HEAD"], root).strip()
        return cls(root, python, commit + (f"+{digest(changes)}" if changes else ""))


@dataclass(frozen=True)
class Steps:
    """First step at which a value differs, and the largest absolute difference over all steps."""

    first: str = ""
    largest: float = 0.0


@dataclass(frozen=True)
class Tensors:
    """Names that only one side has or that differ, and the largest absolute difference."""

    differing: tuple[str, ...] = ()
    largest: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """Result of a case; `failed` says why there is nothing to compare."""

    case: str
    here: str
    there: str
    steps: Steps = Steps()
    tensors: Tensors = Tensors()
    failed: str = ""

    @property
    def equal(self) -> bool:
        return not (self.failed or self.steps.first or self.tensors.differing)

    def __str__(self) -> str:
        if self.failed:
            return f"{self.case:24}FAILED     {self.failed}"
        if self.equal:
            return f"{self.case:24}equal"
        first = self.steps.first or "all steps equal"
        names = self.tensors.differing
        tensors = f"{len(names)} tensors differ, by up to {self.tensors.largest:.3g}: {', '.join(names[:2])}"
        return f"{self.case:24}DIFFERENT  {first}; {tensors if names else 'all tensors equal'}"


def main(config: ComparisonConfig) -> int:
    if torch.cuda.is_available():
        raise ValueError("this compares runs on the CPU; hide the GPU with CUDA_VISIBLE_DEVICES=-1")
    cases = list(select_cases(config.only))
    other = config.other.resolve()
    installed = other / ".venv" / "bin" / "python"
    python = config.python or (installed if installed.is_file() else Path(sys.executable))
    here, there = Checkout.at(ROOT, Path(sys.executable)), Checkout.at(other, python.absolute())
    print(f"here {here.state} {here.root}, there {there.state} {there.root}", flush=True)
    results = []
    config.out.mkdir(parents=True, exist_ok=True)
    for case in cases:
        results.append(run_case(case, here, there, config))
        print(results[-1], flush=True)
        rows = [json.dumps({"equal": row.equal, **asdict(row)}) for row in results]
        (config.out / "results.jsonl").write_text("\n".join(rows) + "\n")
    equal = sum(result.equal for result in results)
    print(f"{equal} of {len(results)} cases equal; {config.out / 'results.jsonl'}")
    return 0 if equal == len(results) else 1


def select_cases(only: Sequence[str]) -> Iterator[Case]:
    """Cases, one process first. ValueError: a name that none contains."""
    cases = [Case(b, s, e) for e, b, s in product(ENGINES, ("dit", "unet"), STRATEGIES)]
    for part in only:
        if not any(part in case.name for case in cases):
            raise ValueError(
                f"only is {part!r}, which is in no case's name: {' '.join(c.name for c in cases)}"
            )
    return (case for case in cases if not only or any(part in case.name for part in only))


def run_case(case: Case, here: Checkout, there: Checkout, config: ComparisonConfig) -> Comparison:
    """Run the case where it has not been run yet, and compare."""
    there_flags = [*rename(case.flags(), config.renamed), *shlex.split(config.other_flags)]
    folders = [(config.out / case.name / side).absolute() for side in ("here", "there")]
    for checkout, flags, folder in zip((here, there), (case.flags(), there_flags), folders, strict=True):
        if failed := train(
            checkout, flags, folder, ranks=1 if case.engine == "one" else 2, again=config.again
        ):
            return Comparison(case.name, here.state, there.state, failed=failed)
    steps, tensors = compare_steps(*folders), compare_tensors(*folders)
    return Comparison(case.name, here.state, there.state, steps, tensors)


def rename(flags: Sequence[str], renamed: Sequence[str]) -> list[str]:
    """Replace flags by the other checkout's names, given as HERE=THERE without dashes."""
    names = {f"--{here}": f"--{there}" for here, _, there in (pair.partition("=") for pair in renamed)}
    return [names.get(flag, flag) for flag in flags]


def train(checkout: Checkout, flags: Sequence[str], folder: Path, *, ranks: int, again: bool) -> str:
    """Train into the folder, unless the same training is finished there; return an error's last lines, or ""."""
    made_by = folder / "same_as.json"
    request = json.dumps({"state": checkout.state, "ranks": ranks, "flags": flags})
    finished = (folder / "finished").is_file() and made_by.is_file() and made_by.read_text() == request
    if finished and not again:
        return ""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made_by.write_text(request)
    launch = ["-m", "deepspeed.launcher.runner", "--master_port", str(free_port())] if ranks > 1 else []
    command = [str(checkout.python), *launch, "experiments/run.py", *flags, "--out", str(folder)]
    env = {name: value for name, value in os.environ.items() if name not in (*LAUNCHER, "PYTHONPATH")}
    env |= {"OMP_NUM_THREADS": "1", "PATH": f"{checkout.python.parent}{os.pathsep}{env['PATH']}"}
    if ranks > 1:
        env["LOCAL_SIZE"] = str(ranks)  # DeepSpeed's launcher starts this many ranks on the CPU
    with (folder / "output.log").open("w") as log:
        code = subprocess.run(command, cwd=checkout.root, env=env, stdout=log, stderr=log).returncode
    if code == 0 and (folder / "finished").is_file():
        return ""
    lines = [line for line in (folder / "output.log").read_text().splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error")] or lines[-1:]
    return f"exit code {code}: {' '.join(said)} ({folder / 'output.log'})"


def read_steps(folder: Path) -> dict[str, dict[str, float]]:
    """The compared values of every step in ``metrics.jsonl``, by stage and step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        f"{line['stage']} step {line['step']}": {
            name: value for key, value in line.items() if (name := OLDER_NAMES.get(key, key)) in FLOATS
        }
        for line in lines
        if "step" in line and "validation" not in line
    }


def compare_steps(here: Path, there: Path) -> Steps:
    """Compare losses, gradient norms and learning rates of two run folders as floats; NaN equals NaN."""
    one, two = read_steps(here), read_steps(there)
    first, largest = "", 0.0
    for step in dict.fromkeys([*one, *two]):
        if step not in one or step not in two:
            first = first or f"{step} only {'here' if step in one else 'there'}"
            continue
        for name in FLOATS:
            a, b = one[step].get(name), two[step].get(name)
            if a is None or b is None:
                first = first or f"{step}: {name} is missing {'here' if a is None else 'there'}"
            elif a != b and not (math.isnan(a) and math.isnan(b)):
                first = first or f"{step}: {name} {a!r} here, {b!r} there"
                largest = max(largest, abs(a - b))
    return Steps(first, largest)


def compare_tensors(here: Path, there: Path) -> Tensors:
    """Compare the weight files of two run folders with torch.equal."""
    differing, largest = list[str](), 0.0
    for file in WEIGHTS:
        one, two = load_file(here / file), load_file(there / file)
        for name in dict.fromkeys([*one, *two]):
            a, b = one.get(name), two.get(name)
            if a is None or b is None:
                differing.append(f"{name} (only {'here' if b is None else 'there'})")
            elif a.dtype != b.dtype or a.shape != b.shape:
                differing.append(f"{name} ({a.dtype} {list(a.shape)} here, {b.dtype} {list(b.shape)} there)")
            elif not torch.equal(a, b):
                differing.append(name)
                largest = max(largest, float((a.double() - b.double()).abs().max()))
    return Tensors(tuple(differing), largest)


def output_of(command: Sequence[str], folder: Path) -> str:
    """Return a command's standard output. ValueError, with its last line, if it fails."""
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if ended.returncode:
        said = ended.stderr.strip().splitlines() or ["nothing"]
        raise ValueError(f"{' '.join(command)} in {folder} failed: {said[-1]}")
    return ended.stdout


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(ComparisonConfig, description=__doc__)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
