"""The plan of a sweep: every point's settings and the addresses of its stages, checked by the parser of runs.

A plan is kept in ``plan.json`` with the sizes and times of all files that it was made from, so that the same sweep is
planned once: without PyTorch and its strategies, repeating a finished sweep takes a moment.
"""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from dit_booth.data.listing import files_named, list_files
from dit_booth.files import CONFIGS, PACKAGE, locate, write_text
from dit_booth.study.description import (
    NOISE_SEEDS,
    REFERENCES,
    TRAIN_SEED,
    Description,
    Variant,
    flatten,
    variants,
)

if TYPE_CHECKING:
    from dit_booth.config import RunConfig, SampleReference

FORMAT = 4
WEIGHTS_AND_DATA = (
    "weights",
    "strategy_weights",
    "clip.pretrained",
    "text.path",
    "autoencoder.path",
    "data.triplets.root",
    "subject.image",
    "subject.mask",
    "subject.video",
)
"""Options that may name files on which a plan depends."""


@dataclass(frozen=True, kw_only=True)
class StageRef:
    """A stage of a point. Equal addresses are one training."""

    name: str
    address: str
    steps: int

    @property
    def key(self) -> str:
        return f"{self.name}-{self.address}"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run: the options that distinguish it, and all settings (``run.yaml`` without its folders)."""

    id: str
    label: str
    group: str
    seed: int
    baseline: bool
    options: dict[str, object]
    stages: tuple[StageRef, ...]
    settings: dict[str, object]


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A sweep's points, its folders and its launcher."""

    name: str
    folder: Path
    store: Path
    launcher: str
    ranks: int
    points: tuple[Point, ...]

    def run_folder(self, point: Point) -> Path:
        return self.folder / "points" / point.id

    def stage_folder(self, stage: StageRef) -> Path:
        return self.store / stage.key

    def uses(self) -> Counter[str]:
        """Count the points of each stage, by its key."""
        return Counter(stage.key for point in self.points for stage in point.stages)


def plan_sweep(description: Description, folder: Path, store: Path) -> SweepPlan:
    """Return the plan in ``plan.json`` if none of its inputs has changed; else make a new one.

    Raises:
        ValueError: an option is unknown or has a wrong value, two points are the same, or no point is the baseline.
    """
    file = folder / "plan.json"
    points = _kept(file, description)
    if points is None:
        points = expand(description)
        known = {
            "format": FORMAT,
            "description": description.as_dict(),
            "inputs": _stamps(_inputs(points, description)),
            "data": _data(_lists(points)),
        }
        write_text(file, json.dumps({**known, "points": [asdict(point) for point in points]}) + "\n")
    return SweepPlan(
        name=description.name,
        folder=folder,
        store=store,
        launcher=description.launcher,
        ranks=description.ranks,
        points=tuple(points),
    )


# ---- points ------------------------------------------------------------------------------------------------


def expand(description: Description) -> list[Point]:
    """Return every point of a description, checked by the parser of runs.

    Controls are sampled with the baseline's points, or with all if the sweep has no baseline.
    """
    spanned = variants(description)
    configs = [_configure(description, variant) for variant in spanned]
    points = [_point(description, *one) for one in zip(spanned, configs, strict=True)]
    seen: dict[str, Point] = {}
    for point in points:
        if point.id in seen:
            raise ValueError(
                f"{description.name}: {seen[point.id].label!r} and {point.label!r} are the same run (seed"
                f" {point.seed}); leave one out"
            )
        seen[point.id] = point
    baseline = _baseline_group(description, points)
    return [
        replace(
            _point(description, variant, _with_controls(config, description.controls)),
            baseline=point.group == baseline,
        )
        if baseline in (None, point.group)
        else point
        for variant, config, point in zip(spanned, configs, points, strict=True)
    ]


def _with_controls(config: RunConfig, controls: tuple[str, ...]) -> RunConfig:
    """Return the configuration with samples for the controls, too, which `Description` has checked."""
    references = cast("tuple[SampleReference, ...]", ("own", *controls))
    return replace(config, sample=replace(config.sample, references=references))


def _point(description: Description, variant: Variant, config: RunConfig) -> Point:
    from dit_booth.config import decisive
    from dit_booth.training.address import digest, stages_of

    where = _where(description, variant)
    if "shuffled" in config.sample.references and config.sample.videos == 1:
        raise ValueError(
            f"{where}: controls has shuffled, another prompt's image, and sample.videos is 1; raise it to 2, or set"
            " controls: [none]"
        )
    try:
        stages = stages_of(config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    settings = config.as_dict()
    own = decisive(settings)
    unseeded = {name: value for name, value in flatten(own).items() if name != TRAIN_SEED}
    return Point(
        id=digest([own, [stage.address for stage in stages]], 10),
        label=variant.label,
        group=digest(unseeded, 10),
        seed=config.train.seed,
        baseline=False,
        options={name: _lookup(settings, name) for name in variant.options},
        stages=tuple(StageRef(name=s.name, address=s.address, steps=s.steps) for s in stages),
        settings=settings,
    )


def _where(description: Description, variant: Variant) -> str:
    return f"{description.name}, point {variant.label!r}"


def _configure(description: Description, variant: Variant) -> RunConfig:
    """Return the configuration of a point's run without controls, made by the parser of runs."""
    from dit_booth.config.parse import one_line, parse, to_argv
    from dit_booth.strategy import names_in, registered

    own: dict[str, object] = {NOISE_SEEDS: list(description.noise_seeds), REFERENCES: ["own"]}
    if variant.seed is not None:
        own[TRAIN_SEED] = variant.seed
    options = {**description.options, **variant.options, **own}
    chosen = names_in(str(options["strategy"])) if "strategy" in options else None
    if chosen is not None:  # as --strategy does: drop the base's options of other strategies
        others = set(registered()) - set(chosen)
        options = {k: v for k, v in options.items() if k in variant.options or k.split(".")[0] not in others}
    said, where = io.StringIO(), _where(description, variant)
    try:
        with redirect_stderr(said), redirect_stdout(said), _quiet():
            return parse(["--config", description.base, *to_argv(options)])
    except SystemExit:
        raise ValueError(f"{where}: {_unknown(description, options) or one_line(said.getvalue())}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _unknown(description: Description, options: Mapping[str, object]) -> str:
    """Return a message for the first unknown option, with its nearest matches; empty if all are known."""
    from dit_booth.config import RunConfig
    from dit_booth.config.parse import config_class, read_yaml
    from dit_booth.errors import suggest

    base = read_yaml(description.base)
    strategy = str(options.get("strategy") or base.get("strategy") or RunConfig.strategy)
    known = flatten(config_class(strategy)().as_dict())
    for name in options:
        if name not in known:
            return f"option {name!r} is unknown to a run of {strategy!r}{suggest(name, known)}"
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Disable the parser's log: its hints are about a command line."""
    old = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(old)


def _baseline_group(description: Description, points: list[Point]) -> str | None:
    """Return the group of the baseline's points; None without a baseline. ValueError: none or several match."""
    baseline = description.baseline
    if baseline is None:
        return None
    if isinstance(baseline, str):
        groups = {point.group for point in points if point.label == baseline}
    else:
        groups = {
            p.group for p in points if all(_matches(p, name, value) for name, value in baseline.items())
        }
    if len(groups) != 1:
        labels = ", ".join(dict.fromkeys(repr(point.label) for point in points))
        raise ValueError(
            f"{description.name}: baseline {baseline!r} is {'none' if not groups else 'more than one'} of the points"
            f" ({labels}); name one by its label or its options"
        )
    return groups.pop()


def _matches(point: Point, name: str, value: object) -> bool:
    try:
        return str(_lookup(point.settings, name)) == str(value)
    except KeyError:
        return False


def _lookup(settings: Mapping[str, object], name: str) -> object:
    """Return the value of a dotted name. KeyError: there is none."""
    value: object = settings
    for part in name.split("."):
        if not isinstance(value, dict):
            raise KeyError(name)
        value = value[part]
    return value


def _texts(settings: Mapping[str, object], *names: str) -> list[str]:
    """Return the values of options as text, the items of a list one by one."""
    values = (_lookup(settings, name) for name in names)
    return [str(item) for value in values for item in (value if isinstance(value, list) else [value])]


# ---- the kept plan -----------------------------------------------------------------------------------------


def _kept(file: Path, description: Description) -> list[Point] | None:
    """Return the points in ``plan.json``; None if the description or an input file has changed."""
    if not file.is_file():
        return None
    kept = json.loads(file.read_text())
    if kept.get("format") != FORMAT or kept["description"] != json.loads(json.dumps(description.as_dict())):
        return None
    if kept["inputs"] != _stamps(list(kept["inputs"])) or kept["data"] != _data(
        entry[:3] for entry in kept["data"]
    ):
        return None
    return [
        Point(**{**point, "stages": tuple(StageRef(**stage) for stage in point["stages"])})
        for point in kept["points"]
    ]


def _inputs(points: list[Point], description: Description) -> list[str]:
    """Return the files and folders that a plan depends on: settings, weights, and the code that reads them."""
    files = {*_chain(Path(description.base))}
    for point in points:
        settings = point.settings
        files |= {locate(name, "configs") for name in _texts(settings, "ds_config")}
        files |= {Path(name) for name in _texts(settings, "plugin")}
        for name in _texts(settings, *WEIGHTS_AND_DATA):
            path = Path(name.removeprefix("local-dir:")).expanduser()
            if name and path.exists():
                files |= {path, *(path.iterdir() if path.is_dir() else ())}
    code = [path for folder in _code_folders() for path in folder.rglob("*")]
    files |= {path for path in code if path.suffix in (".py", ".safetensors") or path.is_dir()}
    return sorted(str(path) for path in files if "__pycache__" not in path.parts)


def _code_folders() -> list[Path]:
    """Return the package's folder and that of its strategies, which lies beside it in a checkout."""
    strategies = find_spec("dit_booth.strategies")
    assert strategies is not None and strategies.submodule_search_locations
    return [PACKAGE, *map(Path, strategies.submodule_search_locations)]


def _lists(points: list[Point]) -> list[list[str]]:
    """Return (folder, format, file that lists examples) of all data sets in files."""
    roots = set()
    for point in points:
        if (kind := _lookup(point.settings, "data.kind")) == "images":
            roots.add((str(_lookup(point.settings, "data.images.root")), "images", ""))
        elif kind != "toyworld":
            names = ("root", "format", "csv")
            root, name, csv = (str(_lookup(point.settings, f"data.triplets.{field}")) for field in names)
            roots.add((root, name, csv))
    return [
        [root, name, str(file)]
        for root, name, csv in sorted(roots)
        for file in list_files(Path(root), name, csv)
    ]


def _data(lists: Iterable[list[str]]) -> list[list[str]]:
    """Add to each (folder, format, list) the hash of the files that it names."""
    return [
        [root, name, file, files_named(Path(root), name, Path(file)) if Path(file).exists() else ""]
        for root, name, file in lists
    ]


def _chain(file: Path) -> list[Path]:
    """Return a configuration file and those that it extends."""
    import yaml

    parent = (yaml.safe_load(file.read_text()) or {}).get("extends")
    return [file, *(_chain(locate(parent, *CONFIGS, beside=file.parent)) if parent else [])]


def _stamps(paths: list[str]) -> dict[str, list[int] | None]:
    """Return size and modification time of each file; None for a missing one."""
    out: dict[str, list[int] | None] = {}
    for path in paths:
        try:
            status = Path(path).stat()
        except OSError:
            out[path] = None
        else:
            out[path] = [status.st_size, status.st_mtime_ns]
    return out
