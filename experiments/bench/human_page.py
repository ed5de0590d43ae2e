"""A human study's page in a real browser: simulated raters go through all of it, and how long it takes to start.

python -m experiments.bench.human_page --raters 20 --table docs/results/human_page.md --pictures pictures
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from dit_booth.commands.study import main as study
from dit_booth.human.analyse import Results, analyse
from dit_booth.human.answers import Choice, read_answers
from dit_booth.human.exclude import Rules
from dit_booth.human.key import Key, read_key
from dit_booth.human.simulate import Population, SimulatedRater, draw_raters, population_strengths
from experiments.bench.browser import Browser, find_browser
from experiments.bench.human_study import QUESTION, write_demo

Act = Callable[[Browser, Choice], None]
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
SYSTEMS = {"first": 0.0, "second": 0.1, "third": 0.2}  # name -> noise
PEOPLE = Population(
    strengths={QUESTION: (1.5, 0.0, -1.5)}, rater_sd=0.3, prompt_sd=0.3, side=0.8, careless=0.2
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    raters: int = 20
    """Simulated raters, of whom a fifth is careless."""
    table: str = ""
    """Markdown file to write; empty: none."""
    pictures: str = ""
    """Folder for a picture of each screen at each size; empty: none."""


# ---- a rater's hands ------------------------------------------------------------------------------------------------


def click(browser: Browser, choice: Choice) -> None:
    browser.click(f"#choose-{choice}")


def press(browser: Browser, choice: Choice) -> None:
    browser.wait("!document.querySelector('#choose-left').disabled")
    browser.press({"left": "ArrowLeft", "tie": "2", "right": "3"}[choice])


def begin(browser: Browser, address: str) -> None:
    """Open the page as a new rater, agree, and answer the example."""
    browser.open(address)
    browser.evaluate("localStorage.clear()")
    browser.open(address)
    for button in ("#agree", "#to-instructions", "#to-example", "#choose-left"):
        browser.click(button)
    browser.click("#begin")


def rate(
    browser: Browser, key: Key, own: int, rater: SimulatedRater, act: Act, start: int = 0
) -> list[Choice]:
    """Answer from question `start` on; the choices. The page must show what the key says."""
    made: list[Choice] = []
    steps = [(n, trial, question) for n, trial in enumerate(key.lists[own], 1) for question in key.questions]
    for n, trial, question in steps[start:]:
        number = key.questions.index(question) + 1
        text = f"pair {n} of {len(key.lists[own])}, question {number} of {len(key.questions)}"
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


# ---- what is measured -----------------------------------------------------------------------------------------------


def make(folder: Path, *words: str, prompts: int, size: int, frames: int) -> Path:
    """Make a study of demo videos."""
    runs = [
        write_demo(folder, name, noise, prompts=prompts, size=size, frames=frames)
        for name, noise in SYSTEMS.items()
    ]
    assert study(["make", *map(str, runs), "--out", str(folder / "study"), *words]) == 0
    return folder / "study"


def simulate(browser: Browser, folder: Path, raters: int) -> Results:
    """Let raters go through the page, one half with the mouse and one by keyboard, and analyse what they save."""
    key = read_key(folder / "key.json")
    files = []
    people = draw_raters(key, PEOPLE, raters, np.random.default_rng(0))
    for number, rater in enumerate(tqdm(people, desc="raters")):
        own = number % len(key.lists)
        begin(browser, f"file://{folder / 'study.html'}#list={own + 1}")
        rate(browser, key, own, rater, press if number % 2 else click)
        files.append(save(browser))
    assert browser.complaints == []
    return analyse(key, read_answers(key, files), Rules(), {})


def measure_start(browser: Browser, page: Path) -> dict[str, float]:
    """Return seconds from the address to the first screen, and from the last click to the first pair's play."""
    browser.open(f"file://{page}")
    browser.evaluate("localStorage.clear()")
    browser.open(f"file://{page}")
    shown = browser.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000
    browser.evaluate("document.querySelector('#agree').click()")
    play = """new Promise((done) => {
        const start = performance.now(), video = document.querySelector('#left');
        document.querySelector('#to-instructions').click();
        document.querySelector('#to-example').click();
        video.addEventListener('timeupdate', () => video.currentTime && done(performance.now() - start));
    })"""
    return {"first screen": shown, "first pair": browser.evaluate(play) / 1000}


def take_pictures(browser: Browser, address: str, out: Path, name: str) -> None:
    """Save a picture of each screen that a rater sees."""

    def take(screen: str) -> None:
        browser.evaluate("new Promise((done) => setTimeout(done, 300))")
        browser.screenshot(out / f"{name}-{screen}.png")

    browser.open(address)
    browser.evaluate("localStorage.clear()")
    browser.open(address)
    for button, screen in (
        (None, "consent"),
        ("#agree", "agreed"),
        ("#to-instructions", "instructions"),
        ("#to-example", "example"),
        ("#choose-left", "feedback"),
        ("#begin", "trial"),
    ):
        if button:
            browser.click(button)
        take(screen)
    while browser.evaluate("document.querySelector('#end').hidden"):
        browser.click("#choose-tie")
    take("end")


# ---- the table ------------------------------------------------------------------------------------------------------


def lines(arguments: Arguments, folder: Path) -> Iterator[str]:
    """Run everything, and iterate over the lines of a page."""
    program = find_browser()
    if program is None:
        raise SystemExit("error: no Chromium or Chrome is installed")
    words = [
        "--raters",
        str(arguments.raters),
        "--pairs",
        "8",
        "--min-seconds",
        "0.1",
        "--questions",
        QUESTION,
    ]
    small = make(folder / "small", *words, prompts=6, size=32, frames=4)
    large = make(folder / "large", prompts=12, size=256, frames=16)
    page = large / "study.html"
    yield "# Human study: simulated raters in the page\n"
    yield f"Repeat with `python -m experiments.bench.human_page --raters {arguments.raters}`. In headless Chromium,"
    yield "simulated raters click and type through the whole page, and the analysis reads the files that they save.\n"
    with Browser(program, folder) as browser:
        yield from result_lines(simulate(browser, small, arguments.raters))
    yield f"\nA page of 24 pairs, 256 x 256 pixels and 16 frames has {page.stat().st_size / 1e6:.1f} MB:\n"
    yield "| size | first screen, s | first pair, s |\n| --- | --- | --- |"
    for name, (width, height) in SIZES.items():
        with tempfile.TemporaryDirectory() as profile:
            phone = name == "phone"
            with Browser(program, Path(profile), width=width, height=height, phone=phone) as browser:
                found = [measure_start(browser, page) for _ in range(5)]
                if arguments.pictures:
                    take_pictures(browser, f"file://{page}", Path(arguments.pictures), name)
        yield f"| {name} | {' | '.join(f'{np.median([one[k] for one in found]):.2f}' for k in found[0])} |"


def result_lines(results: Results) -> Iterator[str]:
    careless = round(PEOPLE.careless * len(results.checked))
    yield f"{len(results.checked)} raters, {careless} of them careless, the others with a side bias of {PEOPLE.side:g}"
    yield f"for the right: {len(results.excluded)} are excluded, and {len(results.observations)} answers count.\n"
    yield "| figure | planted | found |"
    yield "| --- | --- | --- |"
    true = population_strengths(PEOPLE, QUESTION)
    for system, value, e in zip(results.key.systems, true, results.strengths[QUESTION].systems, strict=True):
        yield f"| strength: {system.name} | {value:+.2f} | {e.mean:+.2f} [{e.low:+.2f}, {e.high:+.2f}] |"
    side = results.side
    assert side is not None
    ends = f"{100 * side.mean:.0f} [{100 * side.low:.0f}, {100 * side.high:.0f}]"
    yield f"| answers for the right side, % | above 50 | {ends} |"


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.pictures:
        Path(arguments.pictures).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        text = "\n".join(lines(arguments, Path(folder))) + "\n"
    print(text)
    if arguments.table:
        Path(arguments.table).write_text(text)


if __name__ == "__main__":
    main()
