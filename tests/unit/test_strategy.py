"""The registry: names, duplicates, broken plug-ins, composition, options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from torch import nn

from dit_booth import strategy as module
from dit_booth.config import RunConfig
from dit_booth.config.parse import config_class
from dit_booth.inject import Site, Sites
from dit_booth.strategy import Strategy, StrategyConfig, create, find, load_plugins, register, registered
from dit_booth.training.stage import active_strategies, schedule_of


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry of its own, with the built-in strategies in it."""
    monkeypatch.setattr(module, "_REGISTRY", dict(registered()))
    monkeypatch.setattr(module, "_FAILED", {})
    yield
    load_plugins.cache_clear()


def a_class(name: str, **members: object) -> type[Strategy]:
    return type("Some", (Strategy,), {"__module__": name, **members})


class FakeEntry:
    def __init__(self, name: str, value: str, error: Exception | None = None) -> None:
        self.name, self.value, self.error = name, value, error

    def load(self) -> None:
        if self.error:
            raise self.error
        register("from_entry")(a_class(self.value))


def test_the_built_in_strategies_are_there() -> None:
    names = list(registered())
    assert names == sorted(names)
    assert {"none", "token_replacement", "kv_concat"} <= set(names)
    for name, cls in registered().items():
        assert cls.name == name
        assert issubclass(cls, Strategy)
        assert cls.__doc__, f"{name} has no line for the list"


@pytest.mark.usefixtures("registry")
def test_two_modules_of_one_name_are_an_error_that_names_both() -> None:
    first = register("mine")(a_class("lab.first"))
    with pytest.raises(ValueError, match=r"'mine' is registered by both lab\.first and lab\.second"):
        register("mine")(a_class("lab.second"))
    assert registered()["mine"] is first, "the first stays"
    again = register("mine")(a_class("lab.first"))
    assert registered()["mine"] is again, "a module may be run again (notebooks)"


@pytest.mark.usefixtures("registry")
def test_unknown_names_suggest_the_nearest_and_name_broken_plugins() -> None:
    with pytest.raises(ValueError, match=r"strategy 'kv_conct' is unknown; nearest: kv_concat(,|$)"):
        find("kv_conct")
    module._FAILED["lab (lab.plugin)"] = "ModuleNotFoundError: No module named 'nowhere'"
    with pytest.raises(ValueError) as error:
        find("token_replacement+lab_thing")
    assert "'lab_thing' is unknown" in str(error.value)
    assert "plug-in lab (lab.plugin) failed to import: ModuleNotFoundError" in str(error.value)
    assert list(find("none")) == ["none"], "a broken plug-in breaks nothing else"


@pytest.mark.usefixtures("registry")
def test_a_broken_plugin_does_not_break_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [FakeEntry("bad", "lab.bad", RuntimeError("first line\nboom")), FakeEntry("good", "lab.good")]
    monkeypatch.setattr(module, "entry_points", lambda group: entries if group == module.ENTRY_POINTS else [])
    load_plugins.cache_clear()
    assert "from_entry" in registered()
    assert list(module._FAILED) == ["bad (lab.bad)"]
    assert module._FAILED["bad (lab.bad)"].endswith("boom")


def test_a_plugin_file_does_not_hide_the_built_in_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of --plugin registers before anyone has asked for the list."""
    monkeypatch.setattr(module, "_REGISTRY", {})
    entry = FakeEntry("good", "lab.good")
    monkeypatch.setattr(module, "entry_points", lambda group: [entry])
    load_plugins.cache_clear()
    try:
        register("mine")(a_class("lab.file"))
        assert list(find("mine+from_entry")) == ["mine", "from_entry"]
    finally:
        load_plugins.cache_clear()


def test_sums_keep_their_order_and_take_each_name_once() -> None:
    assert list(find("kv_concat + token_replacement")) == ["kv_concat", "token_replacement"]
    with pytest.raises(ValueError, match=r"'kv_concat\+none\+kv_concat' names 'kv_concat' twice"):
        find("kv_concat+none+kv_concat")
    with pytest.raises(ValueError, match=r"strategy '' is unknown"):
        find("kv_concat+")


# ---- sums, aliases, exclusion -------------------------------------------------------------------------------


def test_videobooth_stands_for_its_two_strategies_in_the_papers_schedule() -> None:
    assert list(find("videobooth")) == ["token_replacement", "kv_concat"]
    assert list(find("videobooth+adaln")) == ["token_replacement", "kv_concat", "adaln"]
    assert module.aliases()["videobooth"] == "token_replacement+kv_concat"
    config = RunConfig(strategy="videobooth")
    assert schedule_of(config) == ("coarse", "fine")
    assert [active_strategies(config, ("coarse", "fine"), i) for i in range(2)] == [
        ("token_replacement",),
        ("token_replacement", "kv_concat"),
    ]
    options = config_class("videobooth")(strategy="videobooth").options()
    assert list(options) == ["token_replacement", "kv_concat"]
    with pytest.raises(ValueError, match=r"'videobooth\+kv_concat' names 'kv_concat' twice"):
        find("videobooth+kv_concat")
    with pytest.raises(ValueError, match=r"'videobuth' is unknown; nearest: videobooth"):
        find("videobuth")


@pytest.mark.usefixtures("registry")
def test_a_name_is_a_strategy_or_an_alias_but_not_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ALIASES", dict(module._ALIASES))
    with pytest.raises(ValueError, match=r"alias 'kv_concat' for 'adaln': the name is taken"):
        module.alias("kv_concat", "adaln")
    with pytest.raises(
        ValueError, match=r"strategy 'videobooth' is an alias of token_replacement\+kv_concat"
    ):
        register("videobooth")(a_class("lab.thing"))
    module.alias("both", "adaln+kv_concat")
    module.alias("both", "adaln+kv_concat")  # a module may run again (notebooks)
    assert list(find("both")) == ["adaln", "kv_concat"]


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("none+kv_concat", "none cannot be combined with kv_concat; leave one of them out"),
        ("kv_concat+adaln+none", "none cannot be combined with kv_concat, adaln"),
        ("kv_concat+in_context", "in_context cannot be combined with kv_concat"),
        ("spatial_concat+in_context", "spatial_concat cannot be combined with in_context"),
    ],
)
def test_strategies_that_exclude_each_other_are_an_error_in_either_order(expression: str, words: str) -> None:
    with pytest.raises(ValueError) as error:
        find(expression)
    assert words in str(error.value) and repr(expression) in str(error.value)


def test_taps_of_a_lower_order_act_first_however_the_sum_is_written() -> None:
    site = Site(name="a", port="latents", role="entry", dim=1)

    class Tap(nn.Module):
        pass

    class First(Strategy):
        order = -1

    def bound(*names: str) -> list[str]:
        classes = {"late": Strategy, "early": First, "later": Strategy}
        built = create({name: classes[name] for name in names}, {}, Sites((site,), 1, 1, 1, 1))
        owner = {id(built.part(name).attach(site, Tap())): name for name in names}
        return [owner[id(tap)] for tap, _ in built.bind(names).taps["a"]]

    assert bound("late", "early", "later") == ["early", "late", "later"]
    assert bound("later", "late", "early") == ["early", "later", "late"]


def test_create_passes_options_and_defaults() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Options(StrategyConfig):
        width: int = 3

    class Mine(Strategy):
        Config = Options

    sites = Sites((), image_dim=1, image_embed_dim=1, latent_channels=1, frames=1)
    strategies = create({"a": Mine, "b": Mine, "c": Strategy}, {"b": Options(width=7)}, sites)
    assert strategies.names == ("a", "b", "c")
    assert [strategies.part(name).config for name in "abc"] == [
        Options(width=3),
        Options(width=7),
        StrategyConfig(),
    ]
