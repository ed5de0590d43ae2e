"""A report's page for tests: writing it, and reading its tables."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from dit_booth.commands.report import main


class Tables(HTMLParser):
    """The texts of a page's tables: class -> rows -> cells. A cell's small print is left out."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.current: list[list[str]] = []
        self.cell, self.small = False, 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.current = self.tables.setdefault(dict(attrs).get("class", "").split()[-1], [])
        elif tag == "tr":
            self.current.append([])
        elif tag in ("td", "th"):
            self.current[-1].append("")
            self.cell = True
        elif tag in ("small", "em"):
            self.small += 1

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = False
        elif tag in ("small", "em"):
            self.small -= 1

    def handle_data(self, data):
        if self.cell and not self.small:
            self.current[-1][-1] += data.strip()


def report(folder: Path, *arguments: str) -> str:
    """The page of a sweep, with both files beside it."""
    assert main([str(folder), "--csv", "--latex", *arguments]) == 0
    return (folder / "report.html").read_text()
