"""The plan of a sweep: every point's settings and the addresses of its stages, checked by the parser that runs have.

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
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_booth.data.listing import files_of
from dit_booth.files import PACKAGE, given_or_packaged, write_text
from dit_booth.study.description import SEEDS, Description, Variant, variants

if TYPE_CHECKING:
    from dit_booth.config import RunConfig

FORMAT = 2


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
    """One run: what differs from the others, and all settings (what ``run.yaml`` holds, without its folders)."""

    id: str
    label: str
    group: str
    seed: int
    baseline: bool
    options: dict[str, Any]
    stages: tuple[StageRef, ...]
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sweep's points, and where everything lies."""

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
        """How many points have each stage, by its key."""
        return Counter(stage.key for point in self.points for stage in point.stages)


def plan_sweep(description: Description, folder: Path, store: Path) -> Plan:
    """The plan that ``plan.json`` has, if nothing that it was made from has changed; else a new one.

    ValueError: an option is unknown or has a wrong value, two points are the same, or the baseline is none of them.
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
    return Plan(
        name=description.name,
        folder=folder,
        store=store,
        launcher=description.launcher,
        ranks=description.ranks,
        points=tuple(points),
    )


# ---- points ------------------------------------------------------------------------------------------------


def expand(description: Description) -> list[Point]:
    """Every point of a description, checked by the parser that a run has."""
    points = [_point(description, variant) for variant in variants(description)]
    seen: dict[str, Point] = {}
    for point in points:
        if point.id in seen:
            raise ValueError(
                f"{description.name}: {seen[point.id].label!r} and {point.label!r} are the same run (seed"
                f" {point.seed}); leave one out"
            )
        seen[point.id] = point
    return _with_baseline(description, points)


def _point(description: Description, variant: Variant) -> Point:
    from dit_booth.config import decisive
    from dit_booth.training.address import digest, stages_of

    where = f"{description.name}, point {variant.label!r}"
    config = _configure(description, variant, where)
    try:
        stages = stages_of(config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    settings = config.as_dict()
    own = decisive(settings)
    unseeded = {name: value for name, value in _flat(own).items() if name not in SEEDS}
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


def _configure(description: Description, variant: Variant, where: str) -> RunConfig:
    """The run of a point, by the program's own parser."""
    from dit_booth.config.parse import parse, to_argv
    from dit_booth.strategy import names_in, registered

    seeds = {} if variant.seed is None else dict.fromkeys(SEEDS, variant.seed)
    options = {**description.options, **variant.options, **seeds}
    chosen = names_in(str(options["strategy"])) if "strategy" in options else None
    if (
        chosen is not None
    ):  # as with --strategy, which drops the configuration file's options of other strategies
        others = set(registered()) - set(chosen)
        options = {k: v for k, v in options.items() if k in variant.options or k.split(".")[0] not in others}
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said), _quiet():
            return parse(["--config", description.base, *to_argv(options)])
    except SystemExit:
        raise ValueError(
            f"{where}: {_unknown(description, options) or _last_words(said.getvalue())}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _unknown(description: Description, options: Mapping[str, Any]) -> str:
    """The first option that no run with these strategies has, and the nearest that it has."""
    from dit_booth.config import RunConfig
    from dit_booth.config.parse import config_class, read_yaml
    from dit_booth.errors import suggest

    base = read_yaml(description.base)
    strategy = str(options.get("strategy") or base.get("strategy") or RunConfig.strategy)
    known = _flat(config_class(strategy)().as_dict())
    for name in options:
        if name not in known:
            return f"option {name!r} is unknown to a run of {strategy!r}{suggest(name, known)}"
    return ""


def _last_words(text: str) -> str:
    """What tyro says in a box, in one line."""
    lines = [line.strip("╭╮╰╯─│ ") for line in text.splitlines()]
    return " ".join(line for line in lines if line and "--help" not in line)


@contextmanager
def _quiet() -> Iterator[None]:
    """The parser's hints are for a command line; a sweep's error names the point."""
    old = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(old)


def _with_baseline(description: Description, points: list[Point]) -> list[Point]:
    """The points of the baseline's group, marked."""
    baseline = description.baseline
    if baseline is None:
        return points
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
    return [Point(**{**vars(point), "baseline": point.group in groups}) for point in points]


def _matches(point: Point, name: str, value: Any) -> bool:
    try:
        return str(_lookup(point.settings, name)) == str(value)
    except KeyError:
        return False


def _lookup(settings: Mapping[str, Any], name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = value[part]
    return value


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in settings.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


# ---- the kept plan -----------------------------------------------------------------------------------------


def _kept(file: Path, description: Description) -> list[Point] | None:
    """The points of ``plan.json``, unless the description or a file that they were made from is another one now."""
    if not file.is_file():
        return None
    kept = json.loads(file.read_text())
    if kept.get("format") != FORMAT or kept["description"] != json.loads(json.dumps(description.as_dict())):
        return None
    if kept["inputs"] != _stamps(list(kept["inputs"])) or kept["data"] != _data(
        entry[:2] for entry in kept["data"]
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
        files |= {given_or_packaged(settings["ds_config"], "configs"), *map(Path, settings["plugin"])}
        named = [settings["weights"], *settings["strategy_weights"], settings["clip"]["pretrained"]]
        named += [settings["autoencoder"]["path"], settings["data"]["root"]]
        for name in named:
            path = Path(str(name).removeprefix("local-dir:")).expanduser()
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
    """The lists of training data in files: each with the data set's folder."""
    data = [point.settings["data"] for point in points]
    roots = {(section["root"], section["csv"]) for section in data if section["kind"] != "toyworld"}
    return [[root, str(file)] for root, csv in sorted(roots) for file in sorted(Path(root).glob(csv))]


def _data(lists: Iterable[list[str]]) -> list[list[str]]:
    """The same with the hash of the files that each list names."""
    return [
        [root, file, files_of(Path(root), Path(file)) if Path(file).is_file() else ""] for root, file in lists
    ]


def _chain(file: Path) -> list[Path]:
    """A configuration file, and those that it extends."""
    import yaml

    parent = (yaml.safe_load(file.read_text()) or {}).get("extends")
    return [file, *(_chain(file.parent / parent) if parent else [])]


def _stamps(paths: list[str]) -> dict[str, list[int] | None]:
    """Size and time of change of each; nothing for one that is gone."""
    out: dict[str, list[int] | None] = {}
    for path in paths:
        try:
            status = Path(path).stat()
        except OSError:
            out[path] = None
        else:
            out[path] = [status.st_size, status.st_mtime_ns]
    return out
