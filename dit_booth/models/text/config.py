"""Options of the text encoder. Standard library only: `--help` stays fast."""

from dataclasses import dataclass
from typing import Literal

from dit_booth.errors import check_ranges


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text encoder that the backbone reads."""

    kind: Literal["clip", "umt5"] = "clip"
    """`clip`: the text tower of section clip; `umt5`: Wan's (pip install dit-booth[wan]), always frozen."""

    path: str = ""
    """umt5: a transformers folder, or a hub name; safetensors only. Empty: the pipeline's folder in `weights`."""

    subfolder: str = "text_encoder"
    """umt5: the folder inside `path` that holds the encoder; empty: `path` itself."""

    tokenizer: str = "tokenizer"
    """umt5: the folder inside `path` that holds the tokenizer; empty: `path` itself."""

    length: int = 512
    """umt5: tokens of a prompt, cut or padded with zeros after the encoder."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """umt5: in which it computes; its 5.7 B parameters (umT5-XXL) take 23 or 11 GB."""

    def __post_init__(self) -> None:
        check_ranges(self, "text", length="[2, 65536]")
