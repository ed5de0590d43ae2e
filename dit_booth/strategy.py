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

        def forward(self, reference, hidden):
            return Condition(shared=reference.embedding)
"""

from __future__ import annotations

import functools
import hashlib
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import entry_points
from typing import ClassVar, TypeVar, get_args

import torch
from torch import Tensor, nn

from dit_booth.anchors import EVERY_FRAME, At, ReferenceAt, TapAtFrames
from dit_booth.attention import Clip
from dit_booth.errors import check_number, suggest
from dit_booth.inject import Bound, Condition, Hidden, Injection, Needs, Noise, Reference, Site, Sites

log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)
ENTRY_POINTS = "dit_booth.strategies"


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Options of a strategy; a subclass's fields become command-line options, their docstrings its help."""


@dataclass(frozen=True, kw_only=True)
class AnchoredConfig(StrategyConfig):
    """Options of a strategy whose image is read frame by frame; its taps find the frames in the payload's `readers`."""

    reference_at: At = "all"
    """Frames that the image reaches: the first, keyframes, or all; counted from the start of the whole video."""
    keyframe_every: int = 8
    """Distance of keyframes, for reference_at=keyframes."""

    def check_anchors(self, section: str) -> None:
        """Raise ValueError for a value that cannot be; `section` is the options' own."""
        if self.reference_at not in get_args(At):
            raise ValueError(
                f"{section}.reference_at is {self.reference_at!r}; choose one of {', '.join(get_args(At))}"
            )
        check_number(f"{section}.keyframe_every", self.keyframe_every, "[1, 100000]")


class Strategy(nn.Module):
    """Base class: owns its taps; runs once per step.

    Parameters are used only inside their owner's ``forward`` (ZeRO-3 gathers them there), and a bare ``nn.Parameter``
    belongs into a module that returns a tensor (its backward hook does not look into payloads). A tap is
    ``forward(payload, image)``; `image` is what the strategy's `Condition` has for it, or None: no image, as in the
    reference's own pass and in the unconditional one.
    """

    name: ClassVar[str]
    Config: ClassVar[type[StrategyConfig]] = StrategyConfig
    trains: Mapping[str, tuple[str, ...]] = {}
    """Stage -> globs over the strategy's own parameters that this stage trains."""
    trains_backbone: Mapping[str, tuple[str, ...]] = {}
    """Stage -> globs over the backbone's parameters that this stage trains."""
    identity_at_init: ClassVar[bool] = False
    """True if the model's output is unchanged by this strategy before any training."""
    reads_image: ClassVar[bool] = True
    """True if the image reaches the network through this strategy."""
    reads_all_images: bool = False
    """True if every image prompt reaches the network (`Reference.all`); else the first one alone."""
    reads_first_frame: ClassVar[bool] = False
    """True if the image prompt is also wanted as the first frame of a video (`Reference.first_frame`)."""
    reads_known_frames: ClassVar[bool] = False
    """True if the network is told which frames are known (`Latents.known`): stages with this strategy have some."""
    excludes: ClassVar[tuple[str, ...]] = ()
    """Globs over the names of strategies that cannot be combined with this one."""
    order: ClassVar[int] = 0
    """At one site the taps of a lower order act first, those of equal order as the combination is written."""
    first_token_suffices: bool = False
    """True if a caption needs only the first token of its subject (the released VideoBooth compares no more:
    docs/fidelity.md); else one without the whole subject is refused."""

    def __init__(self, config: StrategyConfig, sites: Sites) -> None:
        super().__init__()
        self.config = config
        self.taps = nn.Module()  # a tree that mirrors the backbone's paths: taps.blocks.3.attn1
        self.attached: dict[str, nn.Module] = {}
        self.reference_taps = nn.Module()  # the same for taps of the reference's own pass
        self.attached_to_reference: dict[str, nn.Module] = {}
        self.reference_at = EVERY_FRAME
        if isinstance(config, AnchoredConfig):
            self.reference_at = ReferenceAt(config.reference_at, config.keyframe_every)

    def attach(self, site: Site, tap: M, path: str = "") -> M:
        """Put a tap at a site. Its parameters are named ``taps.<site>.<parameter>``: names stay reversible.

        path: in the place of the site's name in those of the parameters.
        """
        self.attached[site.name] = tap
        return _graft(self.taps, path or site.name, tap)

    def attach_to_reference(self, site: Site, tap: M) -> M:
        """Put a tap at a site in the reference's own pass alone: ``reference_taps.<site>.<parameter>``."""
        self.attached_to_reference[site.name] = tap
        return _graft(self.reference_taps, site.name, tap)

    def needs(self) -> Needs:
        """Return what to record of the reference's own pass through the backbone. Default: nothing, no pass."""
        return Needs()

    def forward(self, reference: Reference, hidden: Hidden) -> Condition:
        """Make this step's condition: a pure function of the reference and the hidden states that `needs` names.

        `reference.noisy` is None here: whatever depends on the timestep is in `hidden`. Default: nothing.
        """
        return Condition()

    @classmethod
    def stages(cls) -> frozenset[str]:
        """Return the stages in which this strategy trains parameters of its own or of the backbone."""
        return frozenset((*cls.trains, *cls.trains_backbone))


def _graft(tree: nn.Module, path: str, tap: M) -> M:
    """Add a tap to a tree of modules at a path whose nodes are made as needed."""
    *parents, leaf = path.split(".")
    for part in parents:
        if part not in tree._modules:
            tree.add_module(part, nn.Module())
        tree = tree.get_submodule(part)
    assert leaf not in tree._modules, f"{path}: attach a layer's tap once, and before those of layers in it"
    tree.add_module(leaf, tap)
    return tap


class Strategies(nn.Module):
    """Several strategies at once: ``token_replacement+kv_concat``.

    Parameters are named ``<strategy>.taps.<site>.<parameter>``. At a site with several taps, the earlier one's payload
    is the later one's input: by their `order`, then as written. Each strategy is asked once for what it needs recorded.
    """

    def __init__(self, parts: Mapping[str, Strategy]) -> None:
        super().__init__()
        self.names = tuple(parts)
        self.needs = {name: part.needs() for name, part in parts.items()}
        for name, part in parts.items():
            self.add_module(name, part)

    def part(self, name: str) -> Strategy:
        """Return the strategy of that name."""
        part = self.get_submodule(name)
        assert isinstance(part, Strategy)
        return part

    def reference_frames(self, active: Sequence[str]) -> int:
        """Return how many noised copies of the reference the active strategies ask for, at least one."""
        return max((self.needs[name].frames for name in active), default=1)

    def reads_known_frames(self, active: Sequence[str]) -> bool:
        """True if one of the active strategies tells the network which frames are known."""
        return any(self.part(name).reads_known_frames for name in active)

    def reads_first_frame(self, active: Sequence[str]) -> bool:
        """True if one of the active strategies reads the image prompt as the first frame of a video."""
        return any(self.part(name).reads_first_frame for name in active)

    def first_token_suffices(self, active: Sequence[str]) -> bool:
        """True if one of the active strategies finds a subject by its first token."""
        return any(self.part(name).first_token_suffices for name in active)

    def forward(
        self, reference: Reference, hidden: Mapping[Noise, Hidden], active: Sequence[str]
    ) -> dict[str, Condition]:
        """Make every active strategy's condition; `hidden` holds a recording for each kind of noise they need."""
        made = {}
        for name in (n for n in self.names if n in active):
            needs = self.needs[name]
            made[name] = self.part(name)(reference, {site: hidden[needs.noise][site] for site in needs.sites})
        return made

    def bind(
        self,
        active: Sequence[str],
        conditions: Mapping[str, Condition] | None = None,
        known: Tensor | None = None,
        clip: Clip | None = None,
        *,
        of_reference: bool = False,
    ) -> Injection:
        """Bind the active strategies' taps to their conditions, or, without one, to no image.

        known: b f 1 1 1, 1 in frames that are known. clip: the frames of the pass; none: a whole video.
        of_reference: the pass is the reference's own, which has further taps.
        """
        taps: dict[str, list[Bound]] = {}
        for name in sorted(self.names, key=lambda name: self.part(name).order):
            if name in active:
                condition = (conditions or {}).get(name, Condition())
                at, frames = self.part(name).reference_at, None if clip is None else clip.frames
                for site, tap in self.part(name).attached.items():
                    image = condition.image_at(site)
                    here = tap if at.frames == "all" or image is None else TapAtFrames(tap, at, frames)
                    taps.setdefault(site, []).append((here, image))
                further = self.part(name).attached_to_reference if of_reference else {}
                for site, tap in further.items():
                    taps.setdefault(site, []).append((tap, None))
        return Injection(taps, known=known, clip=clip)


# ---- registry -------------------------------------------------------------------------------------------------------

_REGISTRY: dict[str, type[Strategy]] = {}
_ALIASES: dict[str, str] = {}
_FAILED: dict[str, str] = {}  # plug-in -> last line of its traceback
S = TypeVar("S", bound=type[Strategy])


def register(name: str) -> Callable[[S], S]:
    """Register a strategy class under a name; two classes of one name are an error that names both modules."""

    def add(cls: S) -> S:
        old = _REGISTRY.get(name)
        if name in _ALIASES:
            raise ValueError(
                f"strategy {name!r} is an alias of {_ALIASES[name]}; rename the one in {cls.__module__}"
            )
        if old is not None and old.__module__ != cls.__module__:
            raise ValueError(
                f"strategy {name!r} is registered by both {old.__module__} and {cls.__module__}; rename one"
            )
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def alias(name: str, expression: str) -> None:
    """Name a combination: ``alias("videobooth", "token_replacement+kv_concat")``."""
    if name in _REGISTRY or _ALIASES.get(name, expression) != expression:
        raise ValueError(f"alias {name!r} for {expression!r}: the name is taken; choose another")
    _ALIASES[name] = expression


def names_in(expression: str) -> list[str]:
    """Return the names in ``a+b``, aliases expanded."""
    names = [part.strip() for part in expression.split("+")]
    return [name for part in names for name in _ALIASES.get(part, part).split("+")]


@functools.cache
def load_plugins() -> None:
    """Import all modules under the entry-point group ``dit_booth.strategies``, once; the built-in ones too."""
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception:  # a broken plug-in must not break the others; `find` names it
            _FAILED[f"{entry.name} ({entry.value})"] = traceback.format_exc().strip().splitlines()[-1]
            log.warning("strategy plug-in %s failed to import: %s", entry.value, traceback.format_exc())


def registered() -> dict[str, type[Strategy]]:
    """Return all registered strategies, sorted by name."""
    load_plugins()
    return dict(sorted(_REGISTRY.items()))


def list_strategies(pattern: str = "*") -> list[str]:
    """Return the names of the registered strategies that match a glob."""
    return [name for name in registered() if fnmatchcase(name, pattern)]


def aliases() -> dict[str, str]:
    """Return alias -> the combination that it names."""
    load_plugins()
    return dict(sorted(_ALIASES.items()))


def failed_plugins() -> dict[str, str]:
    """Return the installed plug-ins that failed to import -> the last line of the traceback."""
    load_plugins()
    return dict(_FAILED)


def find(expression: str) -> dict[str, type[Strategy]]:
    """Return the classes that ``a+b`` names, in order.

    ValueError: a name is unknown (the error says what is near, and which plug-ins failed) or repeated, or two of the
    strategies exclude each other.
    """
    known = registered()
    names = names_in(expression)
    for name in names:
        if name not in known:
            failed = "".join(f"; plug-in {k} failed to import: {v}" for k, v in _FAILED.items())
            raise ValueError(f"strategy {name!r} is unknown{suggest(name, {**known, **_ALIASES})}{failed}")
        if names.count(name) > 1:
            raise ValueError(f"strategy {expression!r} names {name!r} twice; name each once")
    for name in names:
        others = [n for n in names if n != name and any(fnmatchcase(n, g) for g in known[name].excludes)]
        if others:
            raise ValueError(
                f"strategy {expression!r}: {name} cannot be combined with {', '.join(others)}; leave one of them out"
            )
    return {name: known[name] for name in names}


def create(
    classes: Mapping[str, type[Strategy]],
    configs: Mapping[str, StrategyConfig],
    sites: Sites,
    seed: int = 0,
) -> Strategies:
    """Build the named strategies on a model's sites; absent options keep their defaults.

    A strategy's random weights depend on `seed` and its own name alone, not on the strategies that it is combined with:
    runs with different fine strategies may share the coarse one's training.
    """
    parts = {}
    for name, cls in classes.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]))
            parts[name] = cls(configs.get(name, cls.Config()), sites)
    return Strategies(parts)
