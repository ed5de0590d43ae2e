"""A small server for a lab: it hands out a study's page and appends answers to a file, each synced to disk.

An answer is acknowledged when it is on disk, and the page sends it again until then: a killed server loses nothing that
a rater was told is saved. What a kill leaves of a line was acknowledged to nobody, and is cut off at the next start.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
from collections.abc import Mapping
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dit_booth.files import read_lines, sync
from dit_booth.human.answers import RATER, parse_answer, parse_rater
from dit_booth.human.key import ANSWERS, KEY, PAGE, Key, read_key

log = logging.getLogger(__name__)
BODY = 4096
"""Largest request in bytes: an answer has about 200."""
_PATIENCE = 20.0  # seconds that a connection may be silent
_COLLECT = '<meta name="collect" content="'


class FullError(OSError):
    """The file of answers has its largest size."""


class AnswerLog:
    """The append-only file of answers: a line for each answer, and for each rater who begins."""

    def __init__(self, folder: Path, key: Key, max_bytes: int) -> None:
        """Open the file; what a kill left of its last line is cut off. ValueError: answers of another study."""
        self.key, self.file, self.max_bytes = key, folder / ANSWERS, max_bytes
        self._lock = threading.Lock()
        new = not self.file.exists()
        self._number = os.open(self.file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        if new:
            sync(folder)
        whole = self.file.read_bytes()
        os.ftruncate(self._number, whole.rfind(b"\n") + 1)
        self._lists: dict[str, int] = {}
        for line in read_lines(self.file):
            if line.get("study") != key.study:
                raise ValueError(f"{self.file} has answers of study {line.get('study')!r}; move it away")
            self._lists[line["rater"]] = line["list"]

    def close(self) -> None:
        os.close(self._number)

    def join(self, rater: str) -> int:
        """Return a rater's list; a new rater gets the one that fewest have."""
        with self._lock:
            if rater not in self._lists:
                taken = list(self._lists.values())
                own = min(range(len(self.key.lists)), key=taken.count)
                self._append({"study": self.key.study, "rater": rater, "list": own})
                self._lists[rater] = own
            return self._lists[rater]

    def add(self, found: Mapping[str, object]) -> None:
        """Append an answer. ValueError: it is none of this study, or of a rater who has not joined."""
        rater, own = parse_rater(self.key, found)
        answer = parse_answer(self.key, found, own)
        with self._lock:
            if self._lists.get(rater) != own:
                raise ValueError(f"rater {rater[:8]} has not list {own}; join first")
            self._append({"study": self.key.study, "rater": rater, "list": own, **asdict(answer)})

    def _append(self, line: Mapping[str, object]) -> None:
        data = (json.dumps(line) + "\n").encode()
        before = os.fstat(self._number).st_size
        if before + len(data) > self.max_bytes:
            raise FullError(f"{self.file} would be larger than {self.max_bytes / 1e6:g} MB (--max-mb)")
        try:
            if os.write(self._number, data) != len(data):
                raise OSError(f"{self.file}: the disk is full")
            os.fsync(self._number)
        except OSError:
            os.ftruncate(self._number, before)  # no torn line before the next answer
            raise


class StudyServer(ThreadingHTTPServer):
    """The server: `http://host:port/TOKEN/` is the page; anything without the token is not found."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, *, host: str, port: int, token: str, max_mb: float = 100.0) -> None:
        """Read the study and listen. ValueError: no study; OSError: the port is taken."""
        self.key = read_key(folder / KEY)
        self.folder, self.token = folder, token
        html = (folder / PAGE).read_text()
        self.page = html.replace(f'{_COLLECT}">', f'{_COLLECT}on">', 1).encode()
        self.answers = AnswerLog(folder, self.key, round(max_mb * 1e6))
        super().__init__((host, port), _Handler)

    @property
    def address(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host if isinstance(host, str) else host.decode()}:{port}/{self.token}/"

    def server_close(self) -> None:
        super().server_close()
        self.answers.close()


class _Handler(BaseHTTPRequestHandler):
    server: StudyServer
    timeout = _PATIENCE
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "dit-booth", ""

    def do_GET(self) -> None:
        name = self._name()
        if name == "":
            self._reply(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        elif name is not None and self._clip(name) is not None:
            self._send_clip(self.server.folder / name)
        else:
            self._reply(HTTPStatus.NOT_FOUND, b"not found", "text/plain")

    def do_POST(self) -> None:
        try:
            size = int(self.headers.get("Content-Length", ""))
        except ValueError:
            size = -1
        name = self._name()
        if not 0 <= size <= BODY or name not in ("answer", "join"):
            self.close_connection = True  # the body is not read
            known = name in ("answer", "join")
            status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE if known else HTTPStatus.NOT_FOUND
            self._reply(status, f"at most {BODY} bytes".encode() if known else b"not found", "text/plain")
            return
        try:
            reply = self._take(name, self.rfile.read(size))
        except ValueError as error:
            self._reply(HTTPStatus.BAD_REQUEST, str(error).encode(), "text/plain")
        except OSError as error:
            log.error("error: %s", error)
            self._reply(HTTPStatus.INSUFFICIENT_STORAGE, b"the answer could not be saved", "text/plain")
        else:
            self._reply(HTTPStatus.OK, json.dumps(reply).encode(), "application/json")

    def _take(self, name: str, body: bytes) -> dict[str, object]:
        try:
            found = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"no JSON ({error})") from error
        if not isinstance(found, dict):
            raise ValueError("the request must be one object")
        if name == "answer":
            self.server.answers.add(found)
            return {}
        rater = found.get("rater")
        if (
            found.get("study") != self.server.key.study
            or not isinstance(rater, str)
            or not RATER.fullmatch(rater)
        ):
            raise ValueError("join needs this study and a rater of 32 hexadecimal digits")
        return {"list": self.server.answers.join(rater)}

    def _name(self) -> str | None:
        """Return the part of the path after the token; None without the right token."""
        token, slash, name = self.path.split("?")[0].removeprefix("/").partition("/")
        good = secrets.compare_digest(token.encode(), self.server.token.encode())
        return name if slash and good else None

    def _clip(self, name: str) -> int | None:
        """Return the number of a clip beside the page, from its one possible name."""
        number = name.removeprefix("media/").removesuffix(".mp4")
        known = number.isascii() and number.isdigit() and int(number) < len(self.server.key.clips)
        return int(number) if known and name == f"media/{int(number)}.mp4" else None

    def _send_clip(self, file: Path) -> None:
        """Send a clip, or the range of it that a browser asks for."""
        if not file.is_file():
            self._reply(HTTPStatus.NOT_FOUND, b"not found", "text/plain")
            return
        data = file.read_bytes()
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not (first.isascii() and first.isdigit() and int(first) < len(data)):
            self._reply(HTTPStatus.OK, data, "video/mp4")
            return
        end = min(int(last), len(data) - 1) if last.isascii() and last.isdigit() else len(data) - 1
        part = {"Content-Range": f"bytes {int(first)}-{end}/{len(data)}"}
        self._reply(HTTPStatus.PARTIAL_CONTENT, data[int(first) : end + 1], "video/mp4", part)

    def _reply(
        self, status: HTTPStatus, body: bytes, kind: str, more: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"}
        headers |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", **(more or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: addresses of raters are personal data."""
