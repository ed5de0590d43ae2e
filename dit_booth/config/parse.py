"""YAML file and command line to a `RunConfig`: the file is turned into arguments, so one parser validates both.

``--config``, ``--strategy``, ``--plugin`` and DeepSpeed's ``--local_rank`` are read first: the strategies' option
classes become sections of the configuration (``--kv-concat.update direct``).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tyro
import yaml

from dit_booth.config import RunConfig
from dit_booth.errors import suggest
from dit_booth.strategy import StrategyConfig, find, names_in, registered

log = logging.getLogger(__name__)
PLUGIN_MODULE = "dit_booth_plugin_"
"""How the names of modules begin that are loaded from the files of ``--plugin``."""

TRUTH = tyro.constructors.ConstructorRegistry()
"""tyro's rules, with ``true`` and ``false`` as YAML has them beside Python's ``True`` and ``False``."""


@TRUTH.primitive_rule
def _truth(
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
    """The run that a command line describes. Exits with a message on a bad flag; ValueError on a bad value."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=default_config)
    first.add_argument("--strategy")
    first.add_argument("--plugin", nargs="*", action="extend", default=[])
    first.add_argument("--local_rank", "--local-rank", type=int)
    peeled, rest = first.parse_known_args(list(argv))
    settings = read_yaml(peeled.config) if peeled.config else {}
    listed = settings.pop("plugin", None) or []
    plugins = list(dict.fromkeys([*([listed] if isinstance(listed, str) else listed), *peeled.plugin]))
    registered()  # the installed ones first: a plug-in that takes one of their names is an error
    for path in plugins:
        load_plugin(path)
    strategy = str(peeled.strategy or settings.get("strategy") or RunConfig.strategy)
    settings["strategy"] = strategy
    drop_other_strategies(settings, strategy, chosen_here=peeled.strategy is not None)
    try:
        flags = [*to_argv(settings), *(["--plugin", *plugins] if plugins else [])]
        return tyro.cli(
            config_class(strategy),
            args=[*flags, *rest],
            description=description,
            prog=prog,
            registry=TRUTH,
            config=(
                tyro.conf.FlagConversionOff,
                tyro.conf.AvoidSubcommands,
                tyro.conf.HelptextFromCommentsOff,  # or every parse reads the classes' sources anew
            ),
        )
    except SystemExit as stop:
        if stop.code and peeled.config:
            log.error("settings come from %s and the command line", peeled.config)
        raise


def read_yaml(path: str, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML mapping; ``extends: other.yaml`` reads that file first (relative to this one)."""
    file = Path(path)
    if file.resolve() in below:
        raise ValueError(f"--config {below[0]} extends itself by way of {path}; remove one `extends`")
    if not file.is_file():
        raise ValueError(
            f"--config {path} is not a file{suggest(file.name, [p.name for p in file.parent.glob('*.yaml')])}"
        )
    try:
        settings = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path} holds a {type(settings).__name__}; write `name: value` lines")
    parent = settings.pop("extends", None)
    if not parent:
        return settings
    return merge(read_yaml(str(file.parent / parent), (*below, file.resolve())), settings)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def drop_other_strategies(settings: dict[str, Any], strategy: str, *, chosen_here: bool) -> None:
    """Sections of strategies that do not run: dropped with a warning where the command line chose another strategy."""
    for name in set(registered()) & set(settings) - set(names_in(strategy)):
        if not chosen_here:
            raise ValueError(
                f"section {name!r} in the file belongs to no strategy of {strategy!r}; remove it or add +{name}"
            )
        log.warning("--strategy %s: the file's options of %s are not used", strategy, name)
        del settings[name]


def to_argv(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A nested mapping as command-line arguments: ``{"a": {"b": 1}}`` -> ``["--a.b=1"]``."""
    out: list[str] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            out += to_argv(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            out += [f"--{name}", *map(str, value)]
        else:
            out += [f"--{name}={value}"]  # one word: a value may begin with a dash
    return out


def config_class(strategy: str) -> type[RunConfig]:
    """`RunConfig` with one more section for each chosen strategy that has options."""
    return _with_sections(
        tuple((name, cls.Config) for name, cls in find(strategy).items() if dataclasses.fields(cls.Config))
    )


@cache  # equal settings are equal objects: one class for one set of sections
def _with_sections(options: tuple[tuple[str, type[StrategyConfig]], ...]) -> type[RunConfig]:
    sections: list[Any] = [(name, cls, dataclasses.field(default=cls())) for name, cls in options]
    return dataclasses.make_dataclass("RunConfig", sections, bases=(RunConfig,), frozen=True, kw_only=True)


def is_plugin(module: str) -> bool:
    """Whether a module was loaded from a file of ``--plugin``."""
    return module.startswith(PLUGIN_MODULE)


def load_plugin(path: str) -> None:
    """Run a Python file that registers strategies."""
    if not Path(path).is_file():
        raise ValueError(f"--plugin {path} is not a file; give the path of a Python file")
    spec = importlib.util.spec_from_file_location(f"{PLUGIN_MODULE}{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses and tyro look up the types of its options
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--plugin {path} failed: {type(error).__name__}: {error}") from error
