"""Compare the models with tensors that the original codes produced.

    python tests/golden/check.py DIR

Every NAME.json with its NAME.safetensors in DIR is checked: the configuration from the json, weights, inputs and
expected outputs from the tensors. One JSON line per case: file, case, max_abs_error, tolerance, ok. An output that
nothing compares, and a file that cannot be read or run, is a line with ok false and "error". Exit status: 0 all cases
are ok; 1 one is not; 2 DIR holds no golden file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cases import CaseResult, Cases, Info, Tensors, outputs
from files import GoldenError, read


@dataclass(frozen=True)
class Family:
    """A format: the module that runs it, the names of its files, and how its content tells (names may be any)."""

    module: str
    names: str
    tells: Callable[[Info, Tensors], bool]

    def cases(self) -> Cases:
        """The module's function."""
        found: Cases = importlib.import_module(self.module).cases
        return found


def settings(info: Info) -> Info:
    config = info.get("config")
    return config if isinstance(config, dict) else {}


FAMILIES = (
    Family("lvdm_cases", "lvdm_conditioning", lambda info, tensors: "inputs.train_pred_x0" in tensors),
    Family("elite_cases", "elite", lambda info, tensors: "inputs.pixel_values_seg" in tensors),
    Family(
        "ddim_inversion_cases",
        "ddim_inversion",
        lambda info, tensors: {"inputs.x0_latent", "weights.Tm"} <= set(tensors),
    ),
    Family(
        "freenoise_cases", "freenoise", lambda info, tensors: any("_permutations" in name for name in tensors)
    ),
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
    Family("text2video_cases", "text2video_zero", lambda info, tensors: "unet_chunk_size" in settings(info)),
    Family("attention_cases", "videobooth_attention", lambda info, tensors: "query_dim" in settings(info)),
    Family("attention_cases", "tune_a_video", lambda info, tensors: False),
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


Line = dict[str, object]
"""What is printed of a case."""


def check_file(path: Path) -> Iterator[Line]:
    """The lines of one file, `path` being its .safetensors, without its name."""
    compared, what = set[str](), ""
    try:
        info, tensors = read(path)
        family = family_of(path.stem, info, tensors)
        what = f"as a {family.names} file "
        for result in family.cases()(info, tensors):
            compared.add(result.name.split(" ")[0])
            yield line(result)
    except GoldenError as error:
        yield failure("", str(error))
    except Exception as error:  # whatever a strange file leads to: the others are checked all the same
        yield failure("", f"{what}it cannot be run: {type(error).__name__}: {error}")
    else:
        for name in sorted(set(outputs(tensors)) - compared):
            yield failure(name, f"{family.module} compares no output of this name")
        if not compared:
            yield failure("", f"{what}it has no output that is compared")


def line(result: CaseResult) -> Line:
    error = result.error if math.isfinite(result.error) else str(result.error)
    return {
        "case": result.name,
        "max_abs_error": error,
        "tolerance": result.tolerance,
        "ok": result.ok,
    }


def failure(case: str, error: str) -> Line:
    return {"case": case, "ok": False, "error": error}


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
        for found in check_file(folder / f"{name}.safetensors"):
            failed |= found["ok"] is not True
            print(json.dumps({"file": name, **found}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
