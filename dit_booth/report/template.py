"""HTML pages from Jinja templates: all text is escaped, and an unknown variable is an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

ASSETS = files("dit_booth.report") / "page"


def style() -> Markup:
    """Return the style sheet of reports."""
    return Markup((ASSETS / "page.css").read_text())


def render(
    template: str, filters: Mapping[str, Callable[..., object]] | None = None, **context: object
) -> str:
    """Render a template's text with filters and variables."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters or {}
    return environment.from_string(template).render(**context)
