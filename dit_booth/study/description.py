"""A sweep's description: one YAML file that varies any options of a run.

    base: ../configs/demo.yaml            # the run that all points start from: relative to this file, or a packaged one
    options: {stages.fine.steps: 150}     # what all points set
    grid: {kv_concat.update: [first_frame_value, direct]}      # every combination
    zip: {stages.fine.lr: [1e-4, 1e-3], stages.fine.steps: [300, 150]}     # element by element
    list: [{label: no image, strategy: none}, {label: fine, strategy: kv_concat}]     # one after the other
    seeds: [0, 1, 2, 3, 4]                # of training: each is a point
    noise_seeds: [0, 1]                   # of sampling: each prompt of a point gets a video of each
    baseline: {kv_concat.update: first_frame_value}
    controls: [shuffled, none]            # floors that are sampled with the baseline's points
    primary: {metric: appearance, contrasts: baseline}         # what is tested (primary.py)

Points are all combinations of grid, zip rows, list entries and seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import yaml

from dit_booth.errors import suggest
from dit_booth.files import CONFIGS, locate, packaged
from dit_booth.study.primary import Primary, check_labels, read_primary

TRAIN_SEED = "train.seed"
"""Option that `seeds` sets."""
NOISE_SEEDS = "sample.seeds"
"""Option that `noise_seeds` sets."""
REFERENCES = "sample.references"
"""Option that `controls` sets: a point's own image prompts, and the controls'."""
CONTROLS = ("shuffled", "none")
LAUNCHERS = ("deepspeed", "python")


@dataclass(frozen=True, kw_only=True)
class Description:
    """A checked description; its options are checked later, by the run's own parser."""

    name: str
    base: str
    about: str = ""
    options: Mapping[str, object]
    grid: Mapping[str, Sequence[object]]
    zip: Mapping[str, Sequence[object]]
    list: Sequence[Mapping[str, object]]
    seeds: tuple[int, ...]
    noise_seeds: tuple[int, ...] = (0,)
    baseline: Mapping[str, object] | str | None = None
    controls: tuple[str, ...] = CONTROLS
    primary: Primary | None = None
    launcher: str = "deepspeed"
    ranks: int = 1

    def as_dict(self) -> dict[str, object]:
        """Return plain containers, as in ``sweep.yaml``."""
        return asdict(self)


@dataclass(frozen=True)
class Variant:
    """One combination: its label, the options that distinguish it, and its training seed."""

    label: str
    options: Mapping[str, object]
    seed: int | None


def read_description(file: Path, override: Path | None = None) -> Description:
    """Read a sweep's file, and apply the values of an override file.

    A path that is no file names a packaged sweep, with or without ``.yaml``. The override has the same keys; its
    ``options`` are added to the sweep's, and its ``sweeps: {NAME: {...}}`` apply to the sweep of that name only.

    Raises:
        ValueError: a key is unknown, or a value has a wrong type.
    """
    file = find_sweep(file)
    settings = _read(file)
    settings.pop("command", None)  # in the copy that lies in a sweep's folder
    _check_keys(settings, str(file))
    name = str(settings.get("name") or file.stem)
    base = _base(settings.get("base"), file)
    if override is not None:
        override = find_sweep(override)
        over = _read(override)
        sections = _mapping(over.pop("sweeps", None) or {}, f"{override}, sweeps")
        _check_keys(over, str(override))
        own = _mapping(sections.get(name) or {}, f"{override}, sweeps.{name}")
        _check_keys(own, f"{override}, sweeps.{name}")
        for values in (over, own):
            base = _base(values["base"], override) if values.get("base") else base
            options = {**_options(settings, "options"), **_options(values, "options")}
            settings = {**settings, **values, "options": options}
        name = str(over.get("name") or f"{name}-{override.stem}")
    if not base:
        raise ValueError(
            f"{file} has no `base`; name the configuration file of the run that all points start from"
        )
    description = _checked(file, name, base, settings)
    _check_options(description, file)
    if description.primary is not None:
        labels = list(dict.fromkeys(variant.label for variant in variants(description)))
        check_labels(description.primary, labels, description.baseline, str(file))
    return description


def find_sweep(file: Path) -> Path:
    """Return `file` if there is one, else the packaged sweep of that name. ValueError: there is neither."""
    found = locate(file, "sweeps")
    if not found.is_file():
        known = [*file.parent.glob("*.yaml"), *packaged("sweeps").glob("*.yaml")]
        near = suggest(file.stem, [path.stem for path in known])
        raise ValueError(f"{file} is neither a file nor a packaged sweep{near}")
    return found


def variants(description: Description) -> list[Variant]:
    """Return all points, seeds innermost. ValueError: an option is in two of grid, zip and list."""
    d = description
    rows = [dict(zip(d.grid, values, strict=True)) for values in itertools.product(*d.grid.values())]
    zipped = [dict(zip(d.zip, values, strict=True)) for values in zip(*d.zip.values(), strict=True)] or [{}]
    short = _short_names([*d.grid, *d.zip, *(name for entry in d.list for name in entry)])
    out = []
    for entry, zips, row, seed in itertools.product(d.list or [{}], zipped, rows, d.seeds or [None]):
        own = {name: value for name, value in entry.items() if name != "label"}
        first = [str(entry["label"])] if "label" in entry else _assignments(own, short)
        label = ", ".join([*first, *_assignments(zips, short), *_assignments(row, short)]) or d.name
        clash = {*own} & {*zips} | {*own} & {*row} | {*zips} & {*row}
        if clash:
            raise ValueError(
                f"{d.name}: {', '.join(sorted(clash))} is in two of grid, zip and list; leave it in one"
            )
        out.append(Variant(label, {**own, **zips, **row}, seed))
    return out


def _checked(file: Path, name: str, base: str, settings: Mapping[str, object]) -> Description:
    grid, zipped = (_lists(settings, key, file) for key in ("grid", "zip"))
    if len({len(values) for values in zipped.values()}) > 1:
        lengths = ", ".join(f"{key}: {len(values)}" for key, values in zipped.items())
        raise ValueError(
            f"{file}: the lists of zip differ in length ({lengths}); give as many values for each option"
        )
    entries = settings.get("list") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{file}: list must hold entries such as {{label: ..., option: value}}")
    launcher, ranks = _launch(settings, file)
    baseline = settings.get("baseline")
    if isinstance(baseline, dict):
        baseline = flatten(baseline)
    elif baseline is not None and not isinstance(baseline, str):
        raise ValueError(f"{file}: baseline is {baseline!r}; name the options of a point, or its label")
    return Description(
        name=name,
        base=base,
        about=str(settings.get("about") or ""),
        options=_options(settings, "options"),
        grid=grid,
        zip=zipped,
        list=[_named(entry) for entry in entries],
        seeds=_seeds(settings, "seeds", file),
        noise_seeds=_seeds(settings, "noise_seeds", file) or (0,),
        baseline=baseline,
        controls=_controls(settings, file),
        primary=read_primary(settings.get("primary"), str(file)),
        launcher=launcher,
        ranks=ranks,
    )


def _seeds(settings: Mapping[str, object], key: str, file: Path) -> tuple[int, ...]:
    seeds = settings.get(key) or []
    if not isinstance(seeds, (list, tuple)) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"{file}: {key} is {seeds!r}; write a list of whole numbers such as [0, 1]")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{file}: {key} is {seeds!r}, which names a seed twice; name each once")
    return tuple(seeds)


def _controls(settings: Mapping[str, object], file: Path) -> tuple[str, ...]:
    controls = settings.get("controls", CONTROLS)
    listed = list(controls) if isinstance(controls, (list, tuple)) else [controls]
    wrong = not isinstance(controls, (list, tuple)) or any(control not in CONTROLS for control in listed)
    if wrong or len(set(listed)) < len(listed):
        raise ValueError(f"{file}: controls is {controls!r}; write a list of {' and '.join(CONTROLS)}, or []")
    return tuple(map(str, listed))


def _check_options(description: Description, file: Path) -> None:
    """Raise ValueError for an option that a key of the sweep sets."""
    d = description
    keys = {TRAIN_SEED: "seeds", NOISE_SEEDS: "noise_seeds", REFERENCES: "controls"}
    for name in dict.fromkeys([*d.options, *d.grid, *d.zip, *(name for entry in d.list for name in entry)]):
        if name in keys:
            raise ValueError(
                f"{file}: {name} is an option that {keys[name]} sets; write it under {keys[name]}"
            )


def _launch(settings: Mapping[str, object], file: Path) -> tuple[str, int]:
    launcher, ranks = settings.get("launcher", "deepspeed"), settings.get("ranks", 1)
    if not isinstance(launcher, str) or launcher not in LAUNCHERS:
        raise ValueError(f"{file}: launcher is {launcher!r}; use {' or '.join(LAUNCHERS)}")
    if (
        not isinstance(ranks, int)
        or isinstance(ranks, bool)
        or ranks < 1
        or (ranks > 1 and launcher == "python")
    ):
        raise ValueError(
            f"{file}: ranks is {ranks!r}; use 1 or more, and launcher deepspeed for more than one"
        )
    return launcher, ranks


def _read(file: Path) -> dict[str, object]:
    try:
        settings = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    return _mapping(settings, str(file))


def _mapping(settings: object, where: str) -> dict[str, object]:
    if not isinstance(settings, dict):
        raise ValueError(f"{where} holds a {type(settings).__name__}; write `key: value` lines")
    return settings


def _check_keys(settings: Mapping[str, object], where: str) -> None:
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


def _lists(settings: Mapping[str, object], key: str, file: Path) -> dict[str, list[object]]:
    lists: dict[str, list[object]] = {}
    for name, value in _options(settings, key).items():
        if not isinstance(value, list) or not value:
            raise ValueError(f"{file}: {key}.{name} is {value!r}; write the list of its values")
        lists[name] = value
    return lists


def _options(settings: Mapping[str, object], key: str) -> dict[str, object]:
    """Return a section of options by their dotted names; empty if there is none."""
    section = settings.get(key) or {}
    assert isinstance(section, dict), "checked by _check_keys"
    return _named(section)


def _named(options: Mapping[str, object]) -> dict[str, object]:
    """Return options by their dotted names; dashes become underscores, as on the command line."""
    return {name.replace("-", "_"): value for name, value in flatten(options).items()}


def flatten(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``; names that are dotted already stay as they are."""
    out: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _base(base: object, file: Path) -> str:
    """Return the path of the configuration that `file` names: relative to it, or a packaged one by its name."""
    if not base:
        return ""
    return str(locate(str(base), *CONFIGS, beside=file.parent))


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """Return for each dotted name its shortest end that no other name has."""
    out = {}
    for name in dict.fromkeys(names):
        parts = name.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = set(names) - {name}
        out[name] = next(end for end in ends if not any(o == end or o.endswith(f".{end}") for o in others))
    return out


def _assignments(options: Mapping[str, object], short: Mapping[str, str]) -> list[str]:
    """Return ``name=value`` for each option, as a label shows it."""
    return [
        f"{short[name]}={'+'.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in options.items()
    ]
