"""The console script: its help, its subcommands, shell completion, and wrong words."""

from __future__ import annotations

import pytest

from dit_booth.cli import COMMANDS, main
from dit_booth.commands.sample import nested


def test_help_shows_an_example_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main([]) == 0
    said = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"dit-booth {name}" in command.example and command.example in said


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_help_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"dit-booth {name}" in said, "usage and examples name the program"


def test_wrong_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["smaple"]) == 2
    assert "error: 'smaple' is no command; nearest: sample" in capsys.readouterr().err
    assert main(["completion", "fish"]) == 2
    assert "name one of bash, zsh, tcsh" in capsys.readouterr().err
    assert main(["strategies", "kv"]) == 1
    assert "no strategy matches 'kv'" in capsys.readouterr().err
    assert main(["models", "vit"]) == 1
    assert "no model matches 'vit'" in capsys.readouterr().err
    for given, message in {
        ("--caption", "a star"): "--image is missing",
        ("--frames", "-1"): "--frames is -1",
        ("--interpolator", "toyworld"): "--interpolator is toyworld, but sample.long.kind is none",
    }.items():
        assert main(["sample", "toyworld", *given]) == 1
        assert message in capsys.readouterr().err


def test_settings_to_sample_with_are_nested() -> None:
    assert nested(["guidance.image=3", "guidance.text=2", "kv-concat.where=", "weights=a=b"]) == {
        "guidance": {"image": "3", "text": "2"},
        "kv_concat": {"where": ""},
        "weights": "a=b",
    }
    with pytest.raises(ValueError, match="--set has 'guidance'; write NAME=VALUE"):
        nested(["guidance"])


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["strategies", "*bank*"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("token_bank: ") and "needs: nothing" in said and "ports: qkv" in said
    assert main(["models", "*nano"]) == 0
    assert capsys.readouterr().out.count("embedded weights") == 2


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["completion", shell])
    said = capsys.readouterr().out
    assert stop.value.code in (0, None)
    for word in (*COMMANDS, "--kv-concat.update", "--seeds", "--dry-run"):
        assert word in said, word
