"""The server of a human study: limits, refusals, and no lost answer when it is killed."""

from __future__ import annotations

import http.client
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from dit_booth.commands.study import main
from dit_booth.human.answers import read_answers
from dit_booth.human.key import Key, read_key, write_key
from dit_booth.human.serve import BODY, StudyServer
from experiments.bench.human_study import plain_key

PAIRS, RATERS = 8, 20
PAGE = '<!doctype html><meta name="collect" content=""><title>x</title>'


def write_study(folder: Path) -> Key:
    key = plain_key(2, PAIRS, RATERS, PAIRS, ["quality", "motion"], 0)
    write_key(folder / "key.json", key)
    (folder / "study.html").write_text(PAGE)
    return key


def request(address: str, name: str, body: object = None, **headers: str) -> tuple[int, bytes]:
    """GET, or POST a JSON body; the status and the reply."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", parts.path + name, data, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StudyServer]:
    write_study(tmp_path)
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "3.mp4").write_bytes(bytes(range(100)))
    with StudyServer(tmp_path, host="127.0.0.1", port=0, token="secret-token", max_mb=0.002) as one:
        thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield one
        one.shutdown()
        thread.join()


def answer(key: Key, rater: str, own: int, n: int) -> dict[str, object]:
    question = key.questions[n % 2]
    head = {"study": key.study, "rater": rater, "list": own}
    return {**head, "trial": n // 2, "question": question, "choice": "tie", "ms": 900, "n": n}


def test_what_is_served_and_what_is_refused(server: StudyServer):
    address, key, rater = server.address, server.key, "0a" * 16
    assert address.startswith("http://127.0.0.1:") and address.endswith("/secret-token/")
    status, page = request(address, "")
    assert status == 200 and b'content="on"' in page and page.endswith(b"<title>x</title>")
    root = address.removesuffix("secret-token/")
    for place in ("", "secret-token", "wrong/", "secret-token/key.json", "secret-token/media/../key.json"):
        assert request(root, place)[0] == 404
    for name in ("media/99999.mp4", "media/03.mp4", "media/1.mp4"):
        assert request(address, name)[0] == 404
    assert request(address, "media/3.mp4") == (200, bytes(range(100)))
    assert request(address, "media/3.mp4", Range="bytes=90-") == (206, bytes(range(90, 100)))
    good = answer(key, rater, 0, 0)
    assert request(address, "answer", good) == (400, b"rater 0a0a0a0a has not list 0; join first")
    assert request(address, "join", {"study": key.study, "rater": rater}) == (200, b'{"list": 0}')
    assert request(address, "join", {"study": key.study, "rater": rater}) == (200, b'{"list": 0}')
    assert request(address, "join", {"study": key.study, "rater": "0b" * 16}) == (200, b'{"list": 1}')
    assert request(address, "answer", good) == (200, b"{}")
    bad = [
        {"trial": 99},
        {"choice": "both"},
        {"study": "x"},
        {"list": True},
        {"ms": -1},
        {"rater": "me"},
        {"n": 1.5},
    ]
    for changed in bad:
        status, reply = request(address, "answer", {**good, **changed})
        assert status == 400 and next(iter(changed)).encode() in reply
    assert request(address, "answer", b"{")[0] == request(address, "answer", b"[1]")[0] == 400
    assert request(address, "answer", b"x" * (BODY + 1))[0] == 413
    assert request(address, "elsewhere", good)[0] == 404
    statuses = [request(address, "answer", answer(key, rater, 0, n))[0] for n in range(1, 16)]
    assert statuses[0] == 200 and statuses[-1] == 507  # the file has its largest size
    kept = read_answers(key, [server.folder / "answers.jsonl"])
    assert len(kept.raters[rater].answers) == statuses.count(200) + 1 and not kept.refused
    stored = (server.folder / "answers.jsonl").read_text()
    assert "127.0.0.1" not in stored and len(stored) <= 2000


def start(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """Launch the real command, and return it with its address."""
    words = [sys.executable, "-m", "dit_booth", "study", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().split()[0]


def test_no_answer_is_lost_when_the_server_is_killed_at_a_random_moment(tmp_path: Path):
    key = write_study(tmp_path)
    process, address = start(tmp_path)
    acknowledged: dict[str, int] = dict.fromkeys((f"{n:032x}" for n in range(RATERS)), 0)

    def rate(rater: str) -> None:
        """Send the answers that are not acknowledged yet, until the end or the server's."""
        try:
            own = json.loads(request(address, "join", {"study": key.study, "rater": rater})[1])["list"]
            for n in range(acknowledged[rater], 2 * PAIRS):
                status, reply = request(address, "answer", answer(key, rater, own, n))
                assert status == 200, reply
                acknowledged[rater] = n + 1
        except (OSError, http.client.HTTPException):
            return

    try:
        with ThreadPoolExecutor(RATERS) as pool:
            for rater in acknowledged:
                pool.submit(rate, rater)
            while sum(acknowledged.values()) < random.randrange(20, 200):
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        process.wait()
        told = dict(acknowledged)
        with (tmp_path / "answers.jsonl").open("a") as file:
            file.write('{"study": "torn')  # what a kill in the middle of a line would leave
        kept = read_answers(key, [tmp_path / "answers.jsonl"])
        assert sum(told.values()) < RATERS * 2 * PAIRS
        for rater, count in told.items():
            have = kept.raters[rater].answers if rater in kept.raters else {}
            assert (
                count <= len(have) <= count + 1
            )  # all that a rater was told, and at most the one on its way
        token = urlsplit(address).path
        process, address = start(tmp_path)
        assert urlsplit(address).path == token
        with ThreadPoolExecutor(RATERS) as pool:
            list(pool.map(rate, acknowledged))
        final = read_answers(key, [tmp_path / "answers.jsonl"])
        assert len(final.raters) == RATERS and all(r.complete(key) for r in final.raters.values())
        assert not final.refused and not final.revised and final.duplicates <= RATERS
        assert sorted(r.list for r in final.raters.values()) == list(range(RATERS))
    finally:
        process.kill()
        process.wait()


def test_what_cannot_be_served_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["serve", str(tmp_path / "none")]) == 1
    assert "does not exist; make the study first" in capsys.readouterr().err
    assert main(["serve", str(tmp_path)]) == 1
    assert "give the folder that `study make` wrote" in capsys.readouterr().err
    write_study(tmp_path)
    assert main(["serve", str(tmp_path), "--token", "a/b"]) == 1
    assert "token is 'a/b'" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--port", "70000"]) == 1
    assert "port is 70000" in capsys.readouterr().err
    other = {"study": "other", "rater": "0a" * 16, "list": 0}
    (tmp_path / "answers.jsonl").write_text(json.dumps(other) + "\n")
    assert main(["serve", str(tmp_path), "--port", "0"]) == 1
    assert "answers of study 'other'; move it away" in capsys.readouterr().err
    assert read_key(tmp_path / "key.json").study
