"""Token replacement: five embeddings of the image take the subject's place in the prompt.

The coarse stage of VideoBooth (section 3.2), which is ELITE's global mapping.
"""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from dit_booth.attention import Segment
from dit_booth.errors import check_ranges
from dit_booth.inject import QKV, Condition, Hidden, Modulation, PromptTokens, Reference, Site, Sites
from dit_booth.strategy import Strategy, StrategyConfig, register

from .parts.mapper import Mapper
from .parts.subject import released_sources, replace_subject, sources


@dataclass(frozen=True, kw_only=True)
class TokenReplacementConfig(StrategyConfig):
    width: int = 0
    """Hidden width of the mapper's MLPs; 0: the image tower's own (1024 for ViT-L/14, as in ELITE)."""
    words: int = 5
    """Embeddings that enter the prompt, the first ones; no parameter depends on it. ELITE samples with 1 (that of the
    last state) after a global stage with all five."""
    l1_weight: float = 0.01
    """Weight of mean |embedding| in the loss."""
    train_text_kv: bool = True
    """Train copies of what reads the text: K/V of every text attention, or the DiT's text projection."""
    compat: Literal["", "videobooth"] = ""
    """videobooth: replace as the released code does, its mistakes included (docs/fidelity.md)."""

    def __post_init__(self) -> None:
        check_ranges(self, "token_replacement", width="[0, 65536]", words="[1, 5]", l1_weight="[0, 1000]")


@register("token_replacement")
class TokenReplacement(Strategy):
    """Image embeddings replace the subject's words before the text transformer (VideoBooth's coarse stage)."""

    Config = TokenReplacementConfig
    trains = {"coarse": ("*",), "joint": ("*",)}

    def __init__(self, config: TokenReplacementConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        self.l1_weight, self.words = config.l1_weight, config.words
        self.first_token_suffices = config.compat == "videobooth"
        (words,) = sites.match("*", port="prompt")
        self.mapper = Mapper(sites.image_dim, config.width or sites.image_dim, words.dim)
        self.attach(words, ReplaceSubject(config.compat))
        if config.train_text_kv:
            for site in sites.of(port="qkv", role="text"):
                self.attach(site, TextKV(site))
            for site in sites.of(port="modulation", role="text"):
                self.attach(site, TextProjection(site))

    def forward(self, reference: Reference, hidden: Hidden) -> Condition:
        words = self.mapper(reference.states)
        return Condition(shared=words[:, : self.words], aux_loss=self.l1_weight * words.abs().mean())


class ReplaceSubject(nn.Module):
    """Replace every occurrence of the subject by the image's words; the tail shifts and is cut at the end."""

    def __init__(self, compat: Literal["", "videobooth"] = "") -> None:
        super().__init__()
        self.sources = {"": sources, "videobooth": released_sources}[compat]

    def forward(self, prompt: PromptTokens, words: Tensor | None) -> PromptTokens:
        if words is None:
            return prompt
        return replace_subject(prompt, words, self.sources)


class TextKV(nn.Module):
    """A text attention's own keys and values for prompts that hold an image."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.to_k_global, self.to_v_global = site.copy_of("to_k"), site.copy_of("to_v")

    def forward(self, qkv: QKV, image: Tensor | None) -> QKV:
        text = qkv.segments[0]
        k, v = self.to_k_global(qkv.source), self.to_v_global(qkv.source)
        return replace(qkv, segments=(Segment(qkv.keys(k), qkv.heads(v), text.frames), *qkv.segments[1:]))


class TextProjection(nn.Module):
    """Without text attention the text enters by one projection: a copy of it is trained instead."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.projection = site.copy_of("projection")

    def forward(self, modulation: Modulation, image: Tensor | None) -> Modulation:
        return replace(modulation, vector=self.projection(modulation.source))
