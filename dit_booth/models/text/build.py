"""The text encoder of a run, whatever its kind."""

from __future__ import annotations

from dit_booth.models.clip.encoders import TextEncoder
from dit_booth.models.text.config import TextConfig
from dit_booth.models.text.umt5 import Umt5TextEncoder

AnyTextEncoder = TextEncoder | Umt5TextEncoder
"""Tokenizes captions (`tokenize`), and encodes prompts (`forward`) behind the `prompt` port."""


def build_text(config: TextConfig, clip: TextEncoder) -> AnyTextEncoder:
    """Return the text encoder of a configuration: `clip`'s text tower, or umT5. ValueError: see `Umt5TextEncoder`."""
    return clip if config.kind == "clip" else Umt5TextEncoder(config)
