"""Strategies: how the reference image enters the network. Base class, registry and composition.

A strategy is one short file::

    @register("adaln")
    class AdaLN(Strategy):
        '''The pooled image shifts every block's modulation.'''
        trains = {"fine": ("*",)}

        def __init__(self, config, sites):
            super().__init__(config, sites)
            for site in sites.of(port="modulation"):
                self.attach(site, Shift(site.dim))

        def forward(self, reference):
            return Condition(vector=reference.embedding)
"""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import ClassVar, TypeVar

from torch import nn

from dit_booth.inject import Condition, Injection, Reference, Site, Sites, suggest

log = logging.getLogger(__name__)
ENTRY_POINTS = "dit_booth.strategies"


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Options of a strategy; a subclass's fields become command-line options, their docstrings its help."""


class Strategy(nn.Module):
    """Owns its taps; runs once per step.

    Parameters are used only inside their owner's ``forward`` (ZeRO-3 gathers them there), and a bare ``nn.Parameter``
    belongs into a module that returns a tensor (its backward hook does not look into payloads). A tap must act as if
    there were no image when it gets the empty `Condition`: so do the reference's own pass and the unconditional one.
    """

    name: ClassVar[str]
    Config: ClassVar[type[StrategyConfig]] = StrategyConfig
    trains: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Stage -> globs over the strategy's own parameters that this stage trains."""
    trains_backbone: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Stage -> globs over the backbone's parameters that this stage trains."""
    identity_at_init: ClassVar[bool] = False
    """Whether the model's output is unchanged by this strategy before any training."""

    def __init__(self, config: StrategyConfig, sites: Sites) -> None:
        super().__init__()
        self.config = config
        self.taps = nn.Module()  # a tree that mirrors the backbone's paths: taps.blocks.3.attn1
        self.attached: dict[str, nn.Module] = {}

    def attach(self, site: Site, tap: nn.Module) -> None:
        """Put a tap at a site. Its parameters are named ``taps.<site>.<parameter>``: names stay reversible."""
        *path, leaf = site.name.split(".")
        node = self.taps
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.add_module(leaf, tap)
        self.attached[site.name] = tap

    def forward(self, reference: Reference) -> Condition:
        """Make this step's condition from the reference. Default: nothing."""
        return Condition()


class Strategies(nn.Module):
    """Several strategies at once, in their written order: ``token_replacement+kv_concat``.

    Parameters are named ``<strategy>.taps.<site>.<parameter>``. At a site that several tap, the earlier one's payload
    is the later one's input.
    """

    def __init__(self, parts: Mapping[str, Strategy]) -> None:
        super().__init__()
        self.names = tuple(parts)
        for name, part in parts.items():
            self.add_module(name, part)

    def part(self, name: str) -> Strategy:
        """The strategy of that name."""
        part = self.get_submodule(name)
        assert isinstance(part, Strategy)
        return part

    def forward(self, reference: Reference, active: Sequence[str]) -> dict[str, Condition]:
        """Every active strategy's condition for this step."""
        return {name: self.part(name)(reference) for name in self.names if name in active}

    def bind(self, conditions: Mapping[str, Condition]) -> Injection:
        """One injection of the taps of all strategies that have a condition; an empty one means: no image."""
        taps: dict[str, list[tuple[nn.Module, Condition]]] = {}
        for name in self.names:
            if name in conditions:
                for site, tap in self.part(name).attached.items():
                    taps.setdefault(site, []).append((tap, conditions[name]))
        return Injection(taps)


# ---- registry -------------------------------------------------------------------------------------------------------

_REGISTRY: dict[str, type[Strategy]] = {}
_FAILED: dict[str, str] = {}  # plug-in -> last line of its traceback
S = TypeVar("S", bound=type[Strategy])


def register(name: str) -> Callable[[S], S]:
    """Register a strategy class under a name; two classes of one name are an error that names both modules."""

    def add(cls: S) -> S:
        old = _REGISTRY.get(name)
        if old is not None and old.__module__ != cls.__module__:
            raise ValueError(
                f"strategy {name!r} is registered by both {old.__module__} and {cls.__module__}; rename one"
            )
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


@functools.cache
def load_plugins() -> None:
    """Once: import all modules under the entry-point group ``dit_booth.strategies``, the built-in ones among them."""
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception:  # a broken plug-in must not break the others; `find` names it
            _FAILED[f"{entry.name} ({entry.value})"] = traceback.format_exc().strip().splitlines()[-1]
            log.warning("strategy plug-in %s failed to import: %s", entry.value, traceback.format_exc())


def registered() -> dict[str, type[Strategy]]:
    """All registered strategies, sorted by name."""
    load_plugins()
    return dict(sorted(_REGISTRY.items()))


def find(expression: str) -> dict[str, type[Strategy]]:
    """The classes that ``a+b`` names, in order. Unknown names say what is near, and which plug-ins failed."""
    known = registered()
    names = [part.strip() for part in expression.split("+")]
    for name in names:
        if name not in known:
            failed = "".join(f"; plug-in {k} failed to import: {v}" for k, v in _FAILED.items())
            raise ValueError(f"strategy {name!r} is unknown{suggest(name, known)}{failed}")
        if names.count(name) > 1:
            raise ValueError(f"strategy {expression!r} names {name!r} twice; name each once")
    return {name: known[name] for name in names}


def create(
    classes: Mapping[str, type[Strategy]], configs: Mapping[str, StrategyConfig], sites: Sites
) -> Strategies:
    """Build the named strategies on a model's sites; options that are absent keep their defaults."""
    return Strategies({name: cls(configs.get(name, cls.Config()), sites) for name, cls in classes.items()})
