"""Textual inversion: learned embeddings of one subject take its words' place (Gal et al., arXiv 2208.01618, section 3).

Optimized per subject, from its image prompt alone (stage `subject`); everything else is frozen.
"""

from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from dit_booth.errors import check_ranges
from dit_booth.inject import PromptTokens, Sites
from dit_booth.strategy import Strategy, StrategyConfig, register

from .parts.subject import replace_subject, sources


@dataclass(frozen=True, kw_only=True)
class TextualInversionConfig(StrategyConfig):
    tokens: int = 1
    """Embeddings that stand for the subject."""

    def __post_init__(self) -> None:
        check_ranges(self, "textual_inversion", tokens="[1, 64]")


@register("textual_inversion")
class TextualInversion(Strategy):
    """Learned embeddings, which start as the subject's own word, replace it in the prompt."""

    Config = TextualInversionConfig
    trains = {"subject": ("*",)}
    reads_image = False
    excludes = ("token_replacement",)
    identity_at_init = True  # of one embedding for a word of one token; several become their mean

    def __init__(self, config: TextualInversionConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        (words,) = sites.match("*", port="prompt")
        self.attach(words, LearnedWord(words.dim, config.tokens))


class LearnedWord(nn.Module):
    """Puts the learned embeddings wherever a prompt names the subject; it needs no image."""

    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.word = Offset(dim, tokens)

    def forward(self, prompt: PromptTokens, image: object) -> PromptTokens:
        inside = rearrange(prompt.spans == 1, "b l -> b l 1").to(prompt.embeddings.dtype)
        count = reduce(inside, "b l 1 -> b 1", "sum").clamp(min=1)
        word = reduce(prompt.embeddings * inside, "b l d -> b d", "sum") / count
        return replace_subject(prompt, self.word(word), sources)


class Offset(nn.Module):
    """An offset to the word's embedding: trained from zero, it starts as the class word and decays towards it.

    A module of its own, whose result is a tensor: ZeRO-3 gathers a parameter where it finds its module's result.
    """

    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(tokens, dim))

    def forward(self, word: Tensor) -> Tensor:
        return rearrange(word, "b d -> b 1 d") + self.offset
