"""A sweep's description: one YAML file that spans points over any options of a run.

    base: ../configs/demo.yaml            # the run that all points start from: relative to this file, or a packaged one
    options: {stages.fine.steps: 150}     # what all points set
    grid: {kv_concat.update: [first_frame_value, direct]}      # every combination
    zip: {stages.fine.lr: [1e-4, 1e-3], stages.fine.steps: [300, 150]}     # lists in step
    list: [{label: no image, strategy: none}, {label: fine, strategy: kv_concat}]     # one after the other
    seeds: [0, 1]                         # of training and of sampling
    baseline: {kv_concat.update: first_frame_value}

Points are all combinations of grid, zip rows, list entries and seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from dit_booth.errors import suggest
from dit_booth.files import packaged

SEEDS = ("train.seed", "sample.seed")
"""What `seeds` sets."""
LAUNCHERS = ("deepspeed", "python")


@dataclass(frozen=True, kw_only=True)
class Description:
    """A description that has been read and checked, except for the options, which the run's own parser checks."""

    name: str
    base: str
    about: str = ""
    options: Mapping[str, Any]
    grid: Mapping[str, Sequence[Any]]
    zip: Mapping[str, Sequence[Any]]
    list: Sequence[Mapping[str, Any]]
    seeds: tuple[int, ...]
    baseline: Mapping[str, Any] | str | None = None
    launcher: str = "deepspeed"
    ranks: int = 1

    def as_dict(self) -> dict[str, Any]:
        """What ``sweep.yaml`` holds."""
        return asdict(self)


@dataclass(frozen=True)
class Variant:
    """One combination: its label, the options that it sets itself, and its seed."""

    label: str
    options: Mapping[str, Any]
    seed: int | None


def read_description(file: Path, override: Path | None = None) -> Description:
    """Read a sweep's file, and one with other values over it.

    A path that is no file names a packaged sweep, with or without ``.yaml``. The override has the same keys; its
    ``options`` are added to the sweep's, and its ``sweeps: {NAME: {...}}`` hold what is for one sweep only.
    ValueError: a key is unknown, or a value is not what it must be.
    """
    file = find_sweep(file)
    settings = _read(file)
    settings.pop("command", None)  # the copy in a sweep's folder begins with it
    _check_keys(settings, str(file))
    name = str(settings.get("name") or file.stem)
    base = _base(settings.get("base"), file)
    if override is not None:
        override = find_sweep(override)
        over = _read(override)
        sections = over.pop("sweeps", None) or {}
        _check_keys(over, str(override))
        for more in (over, sections.get(settings.get("name") or file.stem) or {}):
            _check_keys(more, f"{override}, sweeps.{name}")
            base = _base(more["base"], override) if more.get("base") else base
            both = {**_flat(settings.get("options") or {}), **_flat(more.get("options") or {})}
            settings = {**settings, **more, "options": both}
        name = str(over.get("name") or f"{name}-{override.stem}")
    if not base:
        raise ValueError(
            f"{file} has no `base`; name the configuration file of the run that all points start from"
        )
    return _checked(file, name, base, settings)


def find_sweep(file: Path) -> Path:
    """Return `file` if there is one, else the packaged sweep of that name. ValueError: there is neither."""
    found = file if file.is_file() else find_packaged(str(file), "sweeps")
    if found is None:
        known = [*file.parent.glob("*.yaml"), *packaged("sweeps").glob("*.yaml")]
        near = suggest(file.stem, [path.stem for path in known])
        raise ValueError(f"{file} is neither a file nor a packaged sweep{near}")
    return found


def variants(description: Description) -> list[Variant]:
    """All points, seeds innermost. ValueError: two of them are the same."""
    d = description
    rows = [dict(zip(d.grid, values, strict=True)) for values in itertools.product(*d.grid.values())]
    zipped = [dict(zip(d.zip, values, strict=True)) for values in zip(*d.zip.values(), strict=True)] or [{}]
    short = _short_names([*d.grid, *d.zip, *(name for entry in d.list for name in entry)])
    out = []
    for entry, zips, row, seed in itertools.product(d.list or [{}], zipped, rows, d.seeds or [None]):
        own = {name: value for name, value in entry.items() if name != "label"}
        said = [str(entry["label"])] if "label" in entry else _say(own, short)
        label = ", ".join([*said, *_say(zips, short), *_say(row, short)]) or d.name
        clash = {*own} & {*zips} | {*own} & {*row} | {*zips} & {*row}
        if clash:
            raise ValueError(
                f"{d.name}: {', '.join(sorted(clash))} is in two of grid, zip and list; leave it in one"
            )
        out.append(Variant(label, {**own, **zips, **row}, seed))
    return out


def _checked(file: Path, name: str, base: str, settings: Mapping[str, Any]) -> Description:
    seeds = settings.get("seeds") or []
    if not isinstance(seeds, list) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"{file}: seeds is {seeds!r}; write a list of whole numbers such as [0, 1]")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{file}: seeds is {seeds!r}, with a number twice; name each once")
    grid, zipped = (_lists(settings.get(key), f"{file}: {key}") for key in ("grid", "zip"))
    if len({len(values) for values in zipped.values()}) > 1:
        lengths = ", ".join(f"{key}: {len(values)}" for key, values in zipped.items())
        raise ValueError(f"{file}: the lists of zip differ in length ({lengths}); they are read in step")
    entries = settings.get("list") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{file}: list must hold entries such as {{label: ..., option: value}}")
    launcher, ranks = settings.get("launcher", "deepspeed"), settings.get("ranks", 1)
    if launcher not in LAUNCHERS:
        raise ValueError(f"{file}: launcher is {launcher!r}; use {' or '.join(LAUNCHERS)}")
    if type(ranks) is not int or ranks < 1 or (ranks > 1 and launcher == "python"):
        raise ValueError(
            f"{file}: ranks is {ranks!r}; use 1 or more, and launcher deepspeed for more than one"
        )
    baseline = settings.get("baseline")
    if isinstance(baseline, dict):
        baseline = _flat(baseline)
    elif baseline is not None and not isinstance(baseline, str):
        raise ValueError(f"{file}: baseline is {baseline!r}; name the options of a point, or its label")
    return Description(
        name=name,
        base=base,
        about=str(settings.get("about") or ""),
        options=_flat(settings.get("options") or {}),
        grid=grid,
        zip=zipped,
        list=[_flat(entry) for entry in entries],
        seeds=tuple(seeds),
        baseline=baseline,
        launcher=launcher,
        ranks=ranks,
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds a {type(settings).__name__}; write `key: value` lines")
    return settings


def _check_keys(settings: Any, where: str) -> None:
    if not isinstance(settings, dict):
        raise ValueError(f"{where} holds a {type(settings).__name__}; write `key: value` lines")
    known = [field.name for field in fields(Description)]
    for key in settings:
        if key not in known:
            raise ValueError(f"{where}: {key!r} is no key of a sweep{suggest(str(key), known)}; options of the run"
                             " belong under options, grid, zip or list")  # fmt: skip
    for key in ("options", "grid", "zip"):
        if not isinstance(settings.get(key) or {}, dict):
            raise ValueError(
                f"{where}: {key} holds a {type(settings[key]).__name__}; write `option: ...` lines"
            )


def _lists(values: Any, where: str) -> dict[str, list[Any]]:
    flat = _flat(values or {})
    for name, value in flat.items():
        if not isinstance(value, list) or not value:
            raise ValueError(f"{where}.{name} is {value!r}; write the list of its values")
    return flat


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``; dotted names stay as they are, dashes become underscores."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}".replace("-", "_")
        if isinstance(value, dict):
            out |= _flat(value, f"{name}.")
        else:
            out[name] = value
    return out


def _base(base: object, file: Path) -> str:
    """Return the path of the configuration that `file` names: relative to it, or a packaged one by its name."""
    if not base:
        return ""
    beside = file.parent / str(base)
    found = beside if beside.is_file() else find_packaged(str(base), "configs")
    return str(found or beside)


def find_packaged(name: str, folder: str) -> Path | None:
    """Return the packaged file of that name (with or without ``.yaml``) in ``configs`` or ``sweeps``."""
    files = (packaged(f"{folder}/{name}{suffix}") for suffix in ("", ".yaml"))
    return next((file for file in files if file.is_file()), None)


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted name, or as many parts as tell it from the others."""
    out = {}
    for name in dict.fromkeys(names):
        parts = name.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = set(names) - {name}
        out[name] = next(end for end in ends if not any(o == end or o.endswith(f".{end}") for o in others))
    return out


def _say(options: Mapping[str, Any], short: Mapping[str, str]) -> list[str]:
    return [
        f"{short[name]}={'+'.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in options.items()
    ]
