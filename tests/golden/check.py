"""Compare the models with tensors that the original codes produced.

    python tests/golden/check.py DIR

Every NAME.json with its NAME.safetensors in DIR is checked: the configuration from the json, weights, inputs and
expected outputs from the tensors. One JSON line per case: file, case, max_abs_error, tolerance, ok; a line with
"skipped" says what could not be compared and why. Exit status: 0 all cases are ok; 1 one is not, or a file cannot be
read or is of no known format; 2 DIR holds no golden file.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cases import CaseResult, Cases, Info, Tensors
from files import GoldenError, read


@dataclass(frozen=True)
class Family:
    """A format: the module that runs it, the names of its files, and how its content tells (names may be any)."""

    module: str
    names: str
    tells: Callable[[Info, Tensors], bool]

    def cases(self) -> Cases | None:
        """The module's function; None where there is no such module yet."""
        if not self.module or importlib.util.find_spec(self.module) is None:
            return None
        found: Cases = importlib.import_module(self.module).cases
        return found


def settings(info: Info) -> Info:
    config = info.get("config")
    return config if isinstance(config, dict) else {}


FAMILIES = (
    Family("catvton_cases", "catvton", lambda info, tensors: "inputs.condition_image" in tensors),
    Family(
        "unet_cases",
        "videobooth_unet",
        lambda info, tensors: (
            "block_out_channels" in settings(info) and any(".attn_temp." in k for k in tensors)
        ),
    ),
    Family(
        "mapper_cases",
        "videobooth_mapper",
        lambda info, tensors: "weights.mapper.mapping_0.0.weight" in tensors,
    ),
    Family(
        "diffusion_cases",
        "diffusion",
        lambda info, tensors: any(k.endswith(".alphas_cumprod") for k in tensors),
    ),
    Family("dit_cases", "latte", lambda info, tensors: {"patch_size", "num_frames"} <= set(settings(info))),
    Family("dit_cases", "dit", lambda info, tensors: "patch_size" in settings(info)),
    Family("attention_cases", "videobooth_attention", lambda info, tensors: "query_dim" in settings(info)),
    Family("attention_cases", "tune_a_video", lambda info, tensors: False),
    Family("attention_cases", "text2video_zero", lambda info, tensors: False),
)


def family_of(name: str, info: Info, tensors: Tensors) -> Family:
    """By what the file says of itself, else by its name. Raises GoldenError."""
    for family in FAMILIES:
        if family.tells(info, tensors):
            return family
    for family in FAMILIES:
        if name.startswith(family.names):
            return family
    raise GoldenError(f"unknown format; known are {', '.join(family.names for family in FAMILIES)}")


def check_file(path: Path) -> Iterator[CaseResult]:
    """The results of one file, `path` being its .safetensors. Raises GoldenError where it cannot be run."""
    info, tensors = read(path)
    family = family_of(path.stem, info, tensors)
    cases = family.cases()
    if cases is None:
        yield CaseResult("*", skipped=f"no runner for {family.names} files yet")
        return
    try:
        yield from cases(info, tensors)
    except (KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise GoldenError(
            f"as a {family.names} file it cannot be run: {type(error).__name__}: {error}"
        ) from error


def line(file: str, result: CaseResult) -> dict[str, object]:
    """What is printed of a case."""
    if result.skipped:
        return {"file": file, "case": result.name, "ok": None, "skipped": result.skipped}
    error = result.error if math.isfinite(result.error) else str(result.error)
    return {
        "file": file,
        "case": result.name,
        "max_abs_error": error,
        "tolerance": result.tolerance,
        "ok": result.ok,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dir", metavar="DIR", type=Path, help="folder of NAME.json and NAME.safetensors")
    folder = parser.parse_args(arguments).dir
    names = sorted({path.stem for suffix in ("json", "safetensors") for path in folder.glob(f"*.{suffix}")})
    if not names:
        print(f"error: {folder} holds no golden file (NAME.json with NAME.safetensors)", file=sys.stderr)
        return 2
    failed = False
    for name in names:
        try:
            for result in check_file(folder / f"{name}.safetensors"):
                failed |= not (result.ok or result.skipped)
                print(json.dumps(line(name, result)), flush=True)
        except GoldenError as error:
            failed = True
            print(json.dumps({"file": name, "case": "", "ok": False, "error": str(error)}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
