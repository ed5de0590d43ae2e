"""YAML file, command line or keywords to a `RunConfig`: all become arguments, so one parser validates them.

``--config``, ``--strategy``, ``--plugin`` and DeepSpeed's ``--local_rank`` are read first: the strategies' option
classes become sections of the configuration (``--kv-concat.update direct``).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import tyro
import yaml

from dit_booth.config import PlainDict, RunConfig
from dit_booth.config.pipeline_folder import CONFIG, pipeline_settings
from dit_booth.errors import suggest
from dit_booth.files import CONFIGS, locate, packaged
from dit_booth.strategy import StrategyConfig, find, names_in, registered

log = logging.getLogger(__name__)
PLUGIN_MODULE = "dit_booth_plugin_"
"""Prefix of the names of modules that are loaded from the files of ``--plugin``."""

DEFAULT = "demo"
"""The packaged configuration where none is named."""

YAML_BOOLEANS = tyro.constructors.ConstructorRegistry()
"""tyro's rules, with ``true`` and ``false`` as YAML has them beside Python's ``True`` and ``False``."""


@YAML_BOOLEANS.primitive_rule
def _parse_boolean(
    kind: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[bool] | None:
    if kind.type is not bool:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false}",
        choices=("true", "false", "True", "False"),
        instance_from_str=lambda words: words[0].lower() == "true",
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value).lower()],
    )


def parse(
    argv: Sequence[str], *, default_config: str = "", description: str = "", prog: str | None = None
) -> RunConfig:
    """Return the run that a command line describes.

    SystemExit, with a message on stderr: a bad flag. ValueError: a file, strategy or plug-in that cannot be used.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--strategy")
    first.add_argument("--weights")
    first.add_argument("--plugin", nargs="*", action="extend", default=[])
    first.add_argument("--local_rank", "--local-rank", type=int)
    peeled, rest = first.parse_known_args(list(argv))
    if peeled.weights is not None:
        rest.append(f"--weights={peeled.weights}")
    file, settings = read_settings(peeled.config, default_config, peeled.weights)
    load_plugins(settings, peeled.plugin)
    select_strategy(settings, peeled.strategy)
    try:
        return _parse_flags(settings, rest, description, prog)
    except SystemExit as stop:
        if stop.code and file:
            log.error("settings come from %s and the command line", file)
        raise


def create(config: str | Path | Mapping[str, object], settings: Mapping[str, object]) -> RunConfig:
    """Return the run of a configuration (see `RunConfig.create`) with nested `settings` over it.

    ValueError: anything that cannot be, an unknown name with the nearest ones.
    """
    own = dict(settings)
    _, base = read_settings(config, DEFAULT, own.get("weights"))
    load_plugins(base, _listed(own.pop("plugin", None)))
    strategy = own.pop("strategy", None)
    select_strategy(base, None if strategy is None else str(strategy))
    _check_names(own, config_class(base["strategy"])().as_dict())
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            return _parse_flags(merge(base, own), [])
    except SystemExit:
        raise ValueError(one_line(said.getvalue())) from None


def read_settings(
    config: str | Path | Mapping[str, object] | None, default: str, weights: object
) -> tuple[str, PlainDict]:
    """Return a configuration's name and settings, over those that the pipeline's folder in `weights` fixes.

    config: none: `default`, or, with such a folder, the one for it. weights: none: as the configuration has them.
    """
    fixed = pipeline_settings(str(weights or ""))
    if config is None or config == "":
        config = CONFIG if fixed and default else default
    if isinstance(config, Mapping):
        name, settings = "", dict(config)
    else:
        name, settings = str(config), read_yaml(str(locate(config, *CONFIGS))) if config else {}
    if weights is None:
        fixed = pipeline_settings(str(settings.get("weights", "")))
    return name, merge(fixed, settings)


def _parse_flags(
    settings: PlainDict, flags: Sequence[str], description: str = "", prog: str | None = None
) -> RunConfig:
    """Parse settings as flags, and further flags after them."""
    return tyro.cli(
        config_class(settings["strategy"]),
        args=[*to_argv(settings), *flags],
        description=description,
        prog=prog,
        registry=YAML_BOOLEANS,
        config=(
            tyro.conf.FlagConversionOff,
            tyro.conf.AvoidSubcommands,
            tyro.conf.HelptextFromCommentsOff,  # or every parse reads the classes' sources again
        ),
    )


def _check_names(settings: Mapping[str, object], known: PlainDict, section: str = "") -> None:
    """Raise ValueError for a setting that no field has, or one that is no mapping where a section is."""
    for name, value in settings.items():
        field = f"{section}{name}"
        if name not in known:
            raise ValueError(f"setting {field!r} is unknown{suggest(name, known)}")
        if isinstance(known[name], dict) != isinstance(value, Mapping):
            kind = "a section; give a mapping of its fields" if isinstance(known[name], dict) else "one value"
            raise ValueError(f"setting {field!r} is {value!r}, but it is {kind}")
        if isinstance(value, Mapping):
            _check_names(value, known[name], f"{field}.")


def one_line(box: str) -> str:
    """Return the text of tyro's error box in one line, without its title, rules and the pointer to the help."""
    lines = [line.strip("╭╮╰╯─│|+- ") for line in box.splitlines()]
    said = [line for line in lines if line and "--help" not in line and line != "Value error"]
    return " ".join(said).removeprefix("Error parsing ")


def load_plugins(settings: PlainDict, further: Sequence[str]) -> None:
    """Load the plug-ins that `settings` list and `further` ones; leave the list of both in `settings`."""
    plugins = list(dict.fromkeys([*_listed(settings.get("plugin")), *further]))
    registered()  # the installed ones first: a plug-in that takes one of their names is an error
    for path in plugins:
        load_plugin(path)
    if plugins:
        settings["plugin"] = plugins


def _listed(value: object) -> list[str]:
    """Return the items of a list in YAML, where one item may stand without brackets."""
    return [str(item) for item in (value if isinstance(value, (list, tuple)) else [value] if value else [])]


def select_strategy(settings: PlainDict, chosen: str | None) -> None:
    """Set the strategy: the `chosen` one, that of `settings`, or the default; drop or refuse other sections."""
    strategy = str(chosen or settings.get("strategy") or RunConfig.strategy)
    settings["strategy"] = strategy
    find(strategy)
    drop_other_strategies(settings, strategy, chosen_here=chosen is not None)


def read_yaml(path: str, below: tuple[Path, ...] = ()) -> PlainDict:
    """Read a YAML mapping; ``extends: other.yaml`` reads that file first (relative to this one, or a packaged one)."""
    file = Path(path)
    if file.resolve() in below:
        raise ValueError(f"--config {below[0]} extends itself by way of {path}; remove one `extends`")
    if not file.is_file():
        folders = [file.parent, *map(packaged, CONFIGS)]
        known = [found for folder in folders for found in folder.glob("*.yaml")]
        raise ValueError(f"--config {path} is not a file{suggest(file.name, [p.name for p in known])}")
    try:
        settings: object = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML: {_yaml_problem(error)}; mend the file") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path} holds a {type(settings).__name__}; write `name: value` lines")
    parent = settings.pop("extends", None)
    if not parent:
        return settings
    base = locate(parent, *CONFIGS, beside=file.parent)
    return merge(read_yaml(str(base), (*below, file.resolve())), settings)


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Return the problem and its place in one line; PyYAML's own message draws the line with a caret."""
    mark = getattr(error, "problem_mark", None)
    place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or str(error).splitlines()[0]}{place}"


def merge(base: Mapping[str, object], over: Mapping[str, object]) -> PlainDict:
    """Return `over` on top of `base`, section by section."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def drop_other_strategies(settings: PlainDict, strategy: str, *, chosen_here: bool) -> None:
    """Drop sections of strategies that do not run, with a warning; an error if the file itself chose the strategy."""
    for name in set(registered()) & set(settings) - set(names_in(strategy)):
        if not chosen_here:
            raise ValueError(
                f"section {name!r} in the file belongs to no strategy of {strategy!r}; remove it or add +{name}"
            )
        log.warning("--strategy %s: the file's options of %s are not used", strategy, name)
        del settings[name]


def to_argv(settings: Mapping[str, object], prefix: str = "") -> list[str]:
    """Write a nested mapping as command-line arguments: ``{"a": {"b": 1}}`` -> ``["--a.b=1"]``."""
    out: list[str] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out += to_argv(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            out += [f"--{name}", *map(str, value)]
        else:
            out += [f"--{name}={value}"]  # one word: a value may begin with a dash
    return out


def config_class(strategy: str) -> type[RunConfig]:
    """Return `RunConfig` with one more section for each chosen strategy that has options."""
    return _with_sections(
        tuple((name, cls.Config) for name, cls in find(strategy).items() if dataclasses.fields(cls.Config))
    )


@cache  # equal settings are equal objects: one class for one set of sections
def _with_sections(options: tuple[tuple[str, type[StrategyConfig]], ...]) -> type[RunConfig]:
    sections = [(name, cls, dataclasses.field(default=cls())) for name, cls in options]
    return dataclasses.make_dataclass("RunConfig", sections, bases=(RunConfig,), frozen=True, kw_only=True)


def is_plugin(module: str) -> bool:
    """Return whether a module was loaded from a file of ``--plugin``."""
    return module.startswith(PLUGIN_MODULE)


def load_plugin(path: str) -> None:
    """Run a Python file that registers strategies."""
    if not Path(path).is_file():
        raise ValueError(f"--plugin {path} is not a file; give the path of a Python file")
    spec = importlib.util.spec_from_file_location(f"{PLUGIN_MODULE}{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--plugin {path} is not a Python module; give a file whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses and tyro look up the types of its options
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--plugin {path} failed: {type(error).__name__}: {error}") from error
