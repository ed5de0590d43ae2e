"""The command line: file, flags, strategies' options, plug-ins, and run.yaml as a repeat of the run."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dit_booth import strategy as strategies
from dit_booth.config import RunConfig
from dit_booth.config.parse import parse, to_argv

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "experiments" / "configs" / "demo.yaml")
PLUGIN = '''"""A strategy of one file."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dit_booth.strategy import Strategy, StrategyConfig, register


@dataclass(frozen=True, kw_only=True)
class MineConfig(StrategyConfig):
    depth: int = 1
    """How deep."""
    mode: Literal["soft", "hard"] = "soft"
    """How hard."""


@register("mine")
class Mine(Strategy):
    """Does nothing."""

    Config = MineConfig
'''


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test's plug-ins are forgotten after it."""
    strategies.registered()
    monkeypatch.setattr(strategies, "_REGISTRY", dict(strategies._REGISTRY))
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith("dit_booth_plugin"):
            del sys.modules[name]


def write(folder: Path, name: str, settings: object) -> str:
    path = folder / name
    path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings, sort_keys=False))
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *argv: str, config: str = "") -> str:
    """Parse what must be refused as a bad flag (exit 2); what it says on stderr, in one line."""
    with pytest.raises(SystemExit) as stopped:
        parse(argv, default_config=config)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert not captured.out
    return " ".join(captured.err.replace("│", " ").split())


# ---- file and flags ----


def test_the_file_s_values_arrive(tmp_path: Path):
    settings = {
        "backbone": "unet",
        "data": {"frames": 5, "triplets": {"augment": False}},
        "stages": {"fine": {"lr": "3e-4", "train": ["backbone.*", "text.*"]}},
        "unet": {"channels": [8, 16], "norm_groups": 4, "down_attention": [True, False]},
        "objective": {"kind": "flow", "logit_mean": -0.5},
        "sampler": {"clip_x0": None},
        "schedule": [],
        "train": {"weight_decay": 1e-5},
    }
    config = parse(["--config", write(tmp_path, "a.yaml", settings)])
    assert (config.backbone, config.data.frames, config.data.triplets.augment) == ("unet", 5, False)
    assert config.stages.fine.lr == 3e-4
    assert config.stages.fine.train == ("backbone.*", "text.*")
    assert config.unet.channels == (8, 16)
    assert config.unet.down_attention == (True, False)
    assert config.objective.logit_mean == -0.5
    assert config.sampler.clip_x0 is None
    assert config.schedule == ()
    assert config.train.weight_decay == 1e-5


def test_the_command_line_overrides_the_file(tmp_path: Path):
    file = write(tmp_path, "a.yaml", {"data": {"frames": 5, "size": 24}, "schedule": ["joint"]})
    config = parse(["--data.frames", "6", "--schedule", "coarse", "fine"], default_config=file)
    assert (config.data.frames, config.data.size) == (6, 24)
    assert config.schedule == ("coarse", "fine")


def test_defaults_without_a_file():
    config = parse(["--strategy", "none"])
    assert config.as_dict() == RunConfig(strategy="none").as_dict()


def test_the_config_flag_replaces_the_default_file(tmp_path: Path):
    file = write(tmp_path, "a.yaml", {"data": {"frames": 5}})
    config = parse(["--config", file], default_config=DEMO)
    assert (config.data.frames, config.data.size) == (5, RunConfig().data.size)


def test_extends_reads_another_file_first_and_merges_section_by_section(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "base.yaml", {"data": {"frames": 5, "size": 24}, "backbone": "unet"})
    write(tmp_path / "sub", "middle.yaml", {"extends": "../base.yaml", "data": {"size": 16}})
    file = write(tmp_path / "sub", "top.yaml", {"extends": "middle.yaml", "train": {"seed": 3}})
    config = parse(["--config", file])
    assert (config.data.frames, config.data.size, config.backbone, config.train.seed) == (5, 16, "unet", 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", r"is not YAML: [^\n]*line 1, column 5; mend the file$"),
        ("- a\n- b\n", "holds a list"),
        ("extends: absent.yaml", "absent.yaml is not a file"),
        ("extends: a.yaml", "extends itself"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str, words: str):
    file = write(tmp_path, "a.yaml", text)
    with pytest.raises(ValueError, match=words) as caught:
        parse(["--config", file])
    assert str(tmp_path) in str(caught.value)


def test_a_missing_file_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"demmo\.yaml is not a file; nearest: demo\.yaml"):
        parse(["--config", str(Path(DEMO).with_name("demmo.yaml"))])


def test_local_rank_of_the_launcher_is_accepted():
    for flag in (["--local_rank=0"], ["--local_rank", "1"], ["--local-rank=1"]):
        assert parse([*flag, "--data.frames", "3"], default_config=DEMO).data.frames == 3


@pytest.mark.parametrize("name", sorted(path.name for path in Path(DEMO).parent.glob("*.yaml")))
def test_every_shipped_configuration_parses(name: str):
    parse(["--config", str(Path(DEMO).with_name(name))])


# ---- mistakes ----


def test_an_unknown_option_is_answered_with_the_nearest(capsys):
    said = refused(capsys, "--stages.corse.steps", "3")
    assert "--stages.corse.steps" in said
    assert "--stages.coarse.steps" in said.split("Perhaps you meant")[1]


def test_an_unknown_key_of_the_file_likewise(capsys, caplog, tmp_path: Path):
    file = write(tmp_path, "a.yaml", {"data": {"framse": 5}})
    said = refused(capsys, config=file)
    assert "--data.framse" in said
    assert "--data.frames" in said.split("Perhaps you meant")[1]
    assert file in caplog.text  # where the key came from


@pytest.mark.parametrize("word", ["true", "false", "True", "False"])
def test_truth_is_spelt_as_in_yaml_or_as_in_python(capsys, word: str):
    assert parse(["--train.compile", word]).train.compile is parse([f"--train.compile={word}"]).train.compile
    assert parse(["--train.compile", word]).train.compile is (word in ("true", "True"))
    with pytest.raises(SystemExit):
        parse(["--train.compile", "yes"])
    assert "true" in capsys.readouterr().err


def test_a_value_of_the_wrong_type_and_a_wrong_choice(capsys):
    assert "--train.seed" in refused(capsys, "--train.seed", "many")
    said = refused(capsys, "--backbone", "vit")
    assert all(word in said for word in ("'vit'", "--backbone", "dit", "unet")), said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--stages.coarse.lr -1", "stages.coarse: lr is -1.0; use a number in (0, 1000]"),
        ("--dit.plan sideways", "plan 'sideways': unknown term 'sideways'; use a sum of self, first"),
        ("--data.kind triplets", "data.triplets.root is empty; data.kind=triplets needs the folder"),
        ("--kv-concat.keyframe-every 0", "kv_concat.keyframe_every is 0; use a whole number in [1, 100000]"),
        ("--unet.channels 8 16 32", "unet.down_attention has 4 flags for the 3 levels"),
    ],
)
def test_a_value_that_a_section_refuses_is_a_bad_flag(capsys, argv: str, words: str):
    assert words in refused(capsys, *argv.split())


# ---- strategies ----


def test_an_unknown_strategy_is_answered_with_the_nearest(tmp_path: Path):
    with pytest.raises(ValueError, match=r"'kv_conct' is unknown; nearest: kv_concat"):
        parse(["--strategy", "token_replacement+kv_conct"])
    with pytest.raises(ValueError, match=r"'kv_conct' is unknown; nearest: kv_concat"):
        parse(["--config", write(tmp_path, "a.yaml", {"strategy": "kv_conct"})])
    with pytest.raises(ValueError, match="unknown"):
        parse(["--config", write(tmp_path, "a.yaml", {"strategy": ["kv_concat"]})])


def test_a_strategy_s_options_are_a_section(tmp_path: Path):
    file = write(tmp_path, "a.yaml", {"strategy": "kv_concat", "kv_concat": {"keyframe_every": 4}})
    config = parse(["--kv-concat.update", "direct"], default_config=file)
    options = config.options()["kv_concat"]
    assert (options.update, options.keyframe_every) == ("direct", 4)  # type: ignore[attr-defined]
    assert config.as_dict()["kv_concat"]["update"] == "direct"


def test_options_of_a_strategy_that_does_not_run_are_unknown(capsys):
    assert "--kv-concat.update" in refused(capsys, "--strategy", "none", "--kv-concat.update", "direct")


def test_choosing_another_strategy_drops_the_file_s_options_of_others(tmp_path: Path, caplog):
    settings = {
        "strategy": "token_replacement+kv_concat",
        "kv_concat": {"update": "direct"},
        "token_replacement": {"width": 7},
    }
    file = write(tmp_path, "a.yaml", settings)
    with caplog.at_level(logging.WARNING):
        config = parse(["--strategy", "kv_concat"], default_config=file)
    assert config.options()["kv_concat"].update == "direct"  # type: ignore[attr-defined]
    assert not hasattr(config, "token_replacement")
    assert "token_replacement are not used" in caplog.text
    assert "kv_concat are not used" not in caplog.text


def test_a_foreign_section_that_nobody_asked_to_drop_is_an_error(tmp_path: Path):
    file = write(tmp_path, "a.yaml", {"strategy": "kv_concat", "token_replacement": {"width": 7}})
    with pytest.raises(
        ValueError, match=r"section 'token_replacement'.*remove it or add \+token_replacement"
    ):
        parse([], default_config=file)


# ---- plug-ins ----


def test_a_plugin_s_strategy_can_be_chosen_and_has_options(tmp_path: Path):
    plugin = write(tmp_path, "mine.py", PLUGIN)
    config = parse(
        ["--plugin", plugin, "--strategy", "mine+kv_concat", "--mine.depth", "3", "--mine.mode", "hard"]
    )
    options = config.options()["mine"]
    assert (options.depth, options.mode) == (3, "hard")  # type: ignore[attr-defined]
    assert config.plugin == (plugin,)


def test_plugins_of_the_file_and_of_several_flags_add_up_once_each(tmp_path: Path):
    a, b, c = (
        write(tmp_path, f"{n}.py", PLUGIN.replace('"mine"', f'"{n}"')) for n in ("one", "two", "three")
    )
    file = write(tmp_path, "a.yaml", {"plugin": [a], "strategy": "one+two+three"})
    config = parse(["--config", file, "--plugin", b, "--plugin", c, a])
    assert config.plugin == (a, b, c)
    assert set(config.options()) == {"one", "two", "three"}
    assert parse(["--config", write(tmp_path, "b.yaml", {"plugin": a})]).plugin == (a,)  # one, not in a list


def test_a_plugin_that_comes_first_does_not_hide_the_installed_strategies(tmp_path: Path, monkeypatch):
    """In a fresh program the plug-in is loaded before anything asked for the registered strategies."""
    plugin = write(tmp_path, "mine.py", PLUGIN)
    arguments = ["--plugin", plugin, "--strategy", "mine+kv_concat"]
    code = f"from dit_booth.config.parse import parse; print(parse({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "MineConfig" in done.stdout
    assert "KVConcatConfig" in done.stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import torch\nraise RuntimeError('no luck')\n", "RuntimeError: no luck"),
        ("def f(:\n", "SyntaxError"),
        ("import not_there_at_all\n", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        (PLUGIN.replace('"mine"', '"kv_concat"'), "registered by both dit_booth.strategies.kv_concat and"),
    ],
)
def test_a_broken_plugin_is_named_with_what_it_raised(tmp_path: Path, text: str, words: str):
    plugin = write(tmp_path, "mine.py", text)
    with pytest.raises(ValueError, match="failed") as caught:
        parse(["--plugin", plugin])
    assert plugin in str(caught.value)
    assert words in str(caught.value)


def test_a_plugin_that_is_no_python_module_is_named(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"mine\.txt is not a Python module; give a file whose name ends in \.py"
    ):
        parse(["--plugin", write(tmp_path, "mine.txt", PLUGIN)])


def test_a_plugin_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"none\.py is not a file"):
        parse(["--plugin", "none.py"])


# ---- run.yaml repeats a run ----


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--sampler.clip-x0 None --guidance.channels 3 --objective.beta-start 1e-05",
        "--schedule joint --stages.joint.train backbone.* text.* --stages.joint.strategies kv_concat",
        "--kv-concat.update direct --token-replacement.l1-weight 0 --out here/x",
        "--backbone unet --unet.channels 8 16 32 --unet.heads 1 --unet.down-attention True False True",
        "--objective.logit-mean -0.25 --train.betas 0.9 0.95 --data.triplets.root=-odd-folder",
    ],
)
def test_run_yaml_repeats_the_run(tmp_path: Path, argv: str):
    config = parse(argv.split(), default_config=DEMO)
    file = write(tmp_path, "run.yaml", config.as_dict())
    again = parse(["--config", file])
    assert again == config
    assert again.fingerprint() == config.fingerprint()


def test_run_yaml_repeats_a_run_with_plugins(tmp_path: Path):
    plugin = write(tmp_path, "mine.py", PLUGIN)
    config = parse(["--plugin", plugin, "--strategy", "mine", "--mine.depth", "3"], default_config=DEMO)
    again = parse(["--config", write(tmp_path, "run.yaml", config.as_dict())])
    assert again.as_dict() == config.as_dict()
    assert again.as_dict()["mine"] == {"depth": 3, "mode": "soft"}


def test_to_argv_writes_nested_sections_lists_and_none():
    settings = {"a": {"b": {"c": 1}, "d": None}, "e": (), "f": [True, "x y"]}
    assert to_argv(settings) == ["--a.b.c=1", "--a.d=None", "--e", "--f", "True", "x y"]


# ---- the program's own entry ----


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "experiments/run.py", *argv], cwd=ROOT, env=env, capture_output=True, text=True
    )


def test_help_names_the_fields_and_the_strategies_options():
    done = run("--help", "--strategy", "kv_concat")
    assert done.returncode == 0
    for name in ("--data.frames", "--stages.fine.lr", "--ds-config", "--kv-concat.update", "--plugin"):
        assert name in done.stdout
    assert "Frames of a video." in done.stdout
    assert "--token-replacement.width" not in done.stdout


def test_help_and_settings_load_no_heavy_library():
    """What makes `--help` slow: the engine, the encoders, and what they pull in."""
    code = (
        "import sys; sys.argv = ['run.py', '--help']\n"
        "from dit_booth.run import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = ('deepspeed', 'diffusers', 'open_clip', 'transformers', 'tensorboard', 'timm', 'torchvision')\n"
        "print('loaded:', [name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "loaded: []", done.stdout[-500:] + done.stderr


def test_wrong_values_end_the_program_without_a_traceback(tmp_path: Path):
    done = run("--dit.plan", "sideways")
    assert done.returncode == 2
    assert "unknown term 'sideways'" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("--strategy", "kv_conct")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: strategy 'kv_conct' is unknown; nearest: kv_concat")
