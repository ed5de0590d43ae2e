"""The human study's page in a real browser: simulated raters click and type through it, and the analysis finds them."""

from __future__ import annotations

import csv
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dit_booth.commands.study import main
from dit_booth.human.answers import Choice, read_answers
from dit_booth.human.key import Key, read_key
from dit_booth.human.serve import StudyServer
from dit_booth.human.simulate import Population, SimulatedRater, draw_raters
from experiments.bench.browser import Browser, find_browser
from experiments.bench.human_study import write_demo

PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium or Chrome is installed")
CAPTION = '<img src=x onerror="document.title=1"> & "co" </script>'
Act = Callable[[Browser, Choice], None]


def click(browser: Browser, choice: Choice) -> None:
    browser.click(f"#choose-{choice}")


def press(browser: Browser, choice: Choice) -> None:
    browser.wait("!document.querySelector('#choose-left').disabled")
    browser.press({"left": "ArrowLeft", "tie": "2", "right": "3"}[choice])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    runs = [
        write_demo(folder, name, noise, prompts=3, size=32, frames=4)
        for name, noise in (("clean", 0.0), ("coarse", 0.8))
    ]
    for run in runs:
        rows = list(csv.DictReader((run / "videos.csv").open()))
        rows[1]["caption"] = CAPTION
        with (run / "videos.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    words = ["--raters", "2", "--pairs", "3", "--planted", "2", "--repeats", "0", "--min-seconds", "0.1"]
    assert (
        main(["make", *map(str, runs), "--out", str(folder), *words, "--questions", "quality", "motion"]) == 0
    )
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM, tmp_path_factory.mktemp("browser")) as one:
        yield one


def begin(browser: Browser, address: str) -> None:
    """Open the page as a new rater, agree, and answer the example."""
    browser.open(address)
    browser.evaluate("localStorage.clear()")
    browser.open(address)
    assert browser.evaluate("document.querySelector('#to-instructions').disabled")
    browser.click("#agree")
    browser.click("#to-instructions")
    browser.click("#to-example")
    browser.click("#choose-left")
    assert browser.evaluate("document.querySelector('#feedback').textContent").startswith("Yes.")
    browser.click("#begin")


def rate(
    browser: Browser, key: Key, own: int, rater: SimulatedRater, act: Act, start: int = 0
) -> list[Choice]:
    """Answer from question `start` on; the choices."""
    made: list[Choice] = []
    steps = [(trial, question) for trial in key.lists[own] for question in key.questions]
    for number, (trial, question) in enumerate(steps[start:], start):
        text = f"pair {number // 2 + 1} of {len(key.lists[own])}, question {number % 2 + 1} of 2"
        browser.wait(f"document.querySelector('#count').textContent === {json.dumps(text)}")
        shown = browser.evaluate("document.querySelector('#caption').textContent")
        assert shown == key.prompts[trial.prompt].caption
        made.append(rater.choose(key, trial, question))
        act(browser, made[-1])
    return made


def save(browser: Browser) -> Path:
    """Save the answers as a rater does; the file."""
    before = set(browser.folder.glob("answers-*.json"))
    browser.click("#download")
    while not (new := set(browser.folder.glob("answers-*.json")) - before):
        browser.evaluate("new Promise((done) => setTimeout(done, 20))")
    return new.pop()


def by_mouse(study: Path, browser: Browser, key: Key, rater: SimulatedRater) -> Path:
    """A rater who clicks, and whose file holds exactly the choices."""
    begin(browser, f"file://{study / 'study.html'}#list=1")
    choices = rate(browser, key, 0, rater, click)
    found = json.loads((file := save(browser)).read_text())
    assert [a["choice"] for a in found["answers"]] == choices and found["list"] == 0
    assert all(a["ms"] >= 100 for a in found["answers"][::2])  # no answer before the videos have played
    return file


def by_keyboard(study: Path, browser: Browser, key: Key, rater: SimulatedRater) -> Path:
    """A rater who types, steps through frames, goes back, revises, leaves the page and returns."""
    begin(browser, f"file://{study / 'study.html'}#list=2")
    for _ in range(3):
        press(browser, "tie")
        browser.evaluate("new Promise((done) => setTimeout(done, 320))")
    browser.press("Backspace")
    browser.wait("document.querySelector('#choose-tie').classList.contains('chosen')")
    browser.press(" ")
    browser.press(".")
    browser.wait("document.querySelector('#play').textContent === 'Play'")
    times = browser.evaluate("['left', 'right'].map((id) => document.getElementById(id).currentTime)")
    assert times[0] == times[1] and round(times[0] * 8 - 0.5, 6) in range(4)
    browser.press(" ")
    revised = rate(browser, key, 1, rater, press, start=2)
    browser.open(f"file://{study / 'study.html'}")
    browser.wait("!document.querySelector('#end').hidden")
    file = save(browser)
    answers = json.loads(file.read_text())["answers"]
    assert len(answers) == 2 * len(key.lists[1])
    assert [a["choice"] for a in sorted(answers, key=lambda a: a["n"])] == ["tie", "tie", *revised]
    return file


def served(study: Path, browser: Browser, key: Key, rater: SimulatedRater) -> Path:
    """A rater with a phone, whose answers a server takes one by one."""
    with StudyServer(study, host="127.0.0.1", port=0, token="secret-token", max_mb=1) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            browser.call(
                "Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True
            )
            begin(browser, server.address)
            assert (
                browser.evaluate("document.documentElement.scrollWidth") == 390
            )  # nothing is cut off on a phone
            choices = rate(browser, key, 0, rater, click)
            browser.wait(
                "document.querySelector('#end-text').textContent.startsWith('All your answers are saved')"
            )
        finally:
            server.shutdown()
            thread.join()
    (kept,) = read_answers(key, [study / "answers.jsonl"]).raters.values()
    assert [a.choice for a in kept.answers.values()] == choices and kept.complete(key)
    return study / "answers.jsonl"


@pytest.mark.slow
def test_raters_go_through_the_page_and_are_found(
    study: Path, browser: Browser, capsys: pytest.CaptureFixture[str]
):
    key = read_key(study / "key.json")
    people = Population(strengths=dict.fromkeys(key.questions, (5.0, -5.0)), careless=1 / 3, ties=0.1)
    careless, clicking, typing = draw_raters(key, people, 3, np.random.default_rng(5))
    files = [
        by_mouse(study, browser, key, clicking),
        by_keyboard(study, browser, key, typing),
        served(study, browser, key, careless),
    ]
    assert browser.complaints == [] and browser.evaluate("document.title") == "Which video is better?"
    capsys.readouterr()
    assert main(["analyse", *map(str, files), "--study", str(study), "--out", str(study / "found.html")]) == 0
    said = capsys.readouterr().out
    assert "2 raters, 1 excluded, 12 answers" in said
    assert len(re.findall(r"clean over coarse: (?:[89]\d|100) \[", said)) == 2
