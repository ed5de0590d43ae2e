"""The human study's page in a real browser: simulated raters click and type through it, and the analysis finds them."""

from __future__ import annotations

import csv
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from dit_booth.commands.study import main
from dit_booth.human.answers import read_answers
from dit_booth.human.key import Key, read_key
from dit_booth.human.serve import StudyServer
from dit_booth.human.simulate import Population, SimulatedRater, draw_raters
from experiments.bench.browser import Browser, find_browser
from experiments.bench.human_page import begin, click, press, rate, save
from experiments.bench.human_study import write_demo

PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium or Chrome is installed")
CAPTION = '<img src=x onerror="document.title=1"> & "co" </script>'


class Receiver(BaseHTTPRequestHandler):
    """A researcher's own receiver: it refuses until it is told to take answers."""

    taking = False
    taken: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200 if self.taking else 503)
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Content-Length", "0")
        self.end_headers()
        if self.taking:
            self.taken.append(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def receiver() -> Iterator[str]:
    """The address of a receiver."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/answers"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, receiver: str) -> Path:
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
    words += ["--post", receiver, "--questions", "quality", "motion"]
    assert main(["make", *map(str, runs), "--out", str(folder), *words]) == 0
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM, tmp_path_factory.mktemp("browser")) as one:
        yield one


def end_text(browser: Browser, start: str) -> None:
    browser.wait(f"document.querySelector('#end-text').textContent.startsWith({json.dumps(start)})")


def by_mouse(study: Path, browser: Browser, key: Key, rater: SimulatedRater) -> Path:
    """A rater who clicks, whose answers are not received at once, and whose file holds exactly the choices."""
    begin(browser, f"file://{study / 'study.html'}#list=1")
    choices = rate(browser, key, 0, rater, click)
    end_text(browser, "Please save your answers as a file")
    assert "could not be sent" in browser.evaluate("document.querySelector('#problem').textContent")
    found = json.loads((file := save(browser)).read_text())
    assert [a["choice"] for a in found["answers"]] == choices and found["list"] == 0
    assert all(a["ms"] >= 100 for a in found["answers"][::2])  # no answer before the videos have played
    Receiver.taking = True
    browser.click("#send-again")
    end_text(browser, "Your answers were sent")
    assert browser.evaluate("document.querySelector('#problem').hidden")
    assert Receiver.taken == [file.read_bytes()]
    return file


def by_keyboard(study: Path, browser: Browser, key: Key, rater: SimulatedRater) -> Path:
    """A rater who types, steps through frames, goes back, revises, and returns; the answers are received at once."""
    begin(browser, f"file://{study / 'study.html'}#list=2")
    focused = []
    browser.wait("!document.querySelector('#choose-left').disabled")
    for _ in range(3):
        browser.press("Tab")
        focused.append(browser.evaluate("document.activeElement.id"))
    assert focused == ["choose-left", "choose-tie", "choose-right"]  # right after the question
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
    end_text(browser, "Your answers were sent")  # a page that is left while it sends would send once more
    browser.open(f"file://{study / 'study.html'}")
    end_text(browser, "Your answers were sent")
    file = save(browser)
    assert Receiver.taken[1:] == [file.read_bytes()]
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
            end_text(browser, "All your answers are saved")
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
    (refused,) = browser.complaints
    assert (
        "503" in refused
        and len(Receiver.taken) == 2
        and browser.evaluate("document.title") == "Which video is better?"
    )
    capsys.readouterr()
    assert main(["analyse", *map(str, files), "--study", str(study), "--out", str(study / "found.html")]) == 0
    said = capsys.readouterr().out
    assert "2 raters, 1 excluded, 12 answers" in said
    assert len(re.findall(r"clean over coarse: (?:[89]\d|100) \[", said)) == 2


def test_a_page_that_was_cut_off_says_so(study: Path, browser: Browser, tmp_path: Path):
    text = (study / "study.html").read_text()
    cut = tmp_path / "cut.html"
    cut.write_text(text[: text.index('<script type="text/plain"')])
    browser.open(f"file://{cut}")
    browser.evaluate("localStorage.clear()")
    browser.open(f"file://{cut}")
    for button in ("#agree", "#to-instructions", "#to-example"):
        browser.click(button)
    browser.wait("document.querySelector('#problem').textContent.startsWith('This page is not complete')")
    assert browser.evaluate("document.querySelector('#choose-left').disabled")
