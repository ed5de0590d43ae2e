"""The settings of a study's page."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from dit_booth.errors import check_number
from dit_booth.human.design import Design


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of `page.make_study`; numbers of the design are checked against the runs there."""

    design: Design = "all"
    """Pairs: all of them, each system with the first one (baseline), or blocks of some systems for each prompt."""
    block: int = 3
    """Systems of a prompt in a design of blocks."""
    raters: int = 20
    """Number of lists: raters that the design is balanced for."""
    pairs: int = 24
    """Pairs that each rater sees, besides checks."""
    planted: int = 3
    """Attention checks: pairs with an obviously worse video."""
    repeats: int = 2
    """Pairs that come again, sides swapped."""
    seed: int = 0
    """Seed of lists, sides and order."""
    min_seconds: float = 3.0
    """Playback of a pair before it can be answered."""
    post: str = ""
    """Address that the page sends the answers to at the end; they can be saved as a file besides."""
    beside: bool = False
    """Put the videos beside the page rather than into it."""
    max_mb: float = 20.0
    """Largest page."""

    def __post_init__(self) -> None:
        check_number("seed", self.seed, "[0, 9223372036854775807]")
        check_number("min_seconds", self.min_seconds, "[0, 600]", whole=False)
        check_number("max_mb", self.max_mb, "(0, 1000]", whole=False)
        parts = urlsplit(self.post)
        if self.post and (parts.scheme not in ("http", "https") or not parts.netloc):
            raise ValueError(f"post is {self.post!r}; give an address such as https://lab.example/answers")
