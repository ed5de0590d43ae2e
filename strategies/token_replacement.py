"""Token replacement: five embeddings of the image take the subject's place in the prompt.

The coarse stage of VideoBooth (section 3.2), which is ELITE's global mapping.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from dit_booth.attention import Segment
from dit_booth.inject import QKV, Condition, Modulation, PromptTokens, Reference, Site, Sites
from dit_booth.strategy import Strategy, StrategyConfig, register


@dataclass(frozen=True, kw_only=True)
class TokenReplacementConfig(StrategyConfig):
    width: int = 0
    """Hidden width of the mapper's MLPs; 0: the image tower's own (1024 for ViT-L/14, as in ELITE)."""
    penalty: float = 0.01
    """Weight of mean |embedding| in the loss."""
    train_text_kv: bool = True
    """Train copies of what reads the text: K/V of every text attention, or the DiT's text projection."""
    compat: Literal["", "videobooth"] = ""
    """videobooth: replace as the released code does, its mistakes included (docs/fidelity.md)."""


@register("token_replacement")
class TokenReplacement(Strategy):
    """Image embeddings replace the subject's words before the text transformer (VideoBooth's coarse stage)."""

    Config = TokenReplacementConfig
    trains = {"coarse": ("*",), "joint": ("*",)}
    depends_on_time = False

    def __init__(self, config: TokenReplacementConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        self.penalty, self.first_token_suffices = config.penalty, config.compat == "videobooth"
        (words,) = sites.match("*", port="prompt")
        self.mapper = Mapper(sites.image_dim, config.width or sites.image_dim, words.dim)
        self.attach(words, ReplaceSubject(config.compat))
        if config.train_text_kv:
            for site in sites.of(port="qkv", role="text"):
                self.attach(site, TextKV(site))
            for site in sites.of(port="modulation", role="text"):
                self.attach(site, TextProjection(site))

    def forward(self, reference: Reference) -> Condition:
        words = self.mapper(reference.states)
        return Condition(tokens=words, penalty=self.penalty * words.abs().mean())


class Mapper(nn.Module):
    """e_j = MLP_cls_j(s_j[:, :1]) + mean over patches of MLP_patch_j(s_j[:, 1:]), for five image states s_j."""

    def __init__(self, image_dim: int, width: int, text_dim: int, states: int = 5) -> None:
        super().__init__()
        self.states = states
        for j in range(states):  # upstream's names
            self.add_module(f"mapping_{j}", _mlp(image_dim, width, text_dim))
            self.add_module(f"mapping_patch_{j}", _mlp(image_dim, width, text_dim))

    def forward(self, states: tuple[Tensor, ...]) -> Tensor:
        """Five of (b (1 + n) c) -> b 5 d."""
        cls, patch = (
            [self.get_submodule(f"{n}_{j}") for j in range(self.states)] for n in ("mapping", "mapping_patch")
        )
        words = [
            c(s[:, :1]) + p(s[:, 1:]).mean(1, keepdim=True)
            for c, p, s in zip(cls, patch, states, strict=True)
        ]
        return torch.cat(words, dim=1)


def _mlp(image_dim: int, width: int, text_dim: int) -> nn.Sequential:
    hidden = [nn.Linear(image_dim, width), nn.LayerNorm(width), nn.LeakyReLU()]
    return nn.Sequential(
        *hidden, nn.Linear(width, width), nn.LayerNorm(width), nn.LeakyReLU(), nn.Linear(width, text_dim)
    )


class ReplaceSubject(nn.Module):
    """Every occurrence of the subject becomes the image's words; the tail shifts; what passes the end is cut."""

    def __init__(self, compat: Literal["", "videobooth"] = "") -> None:
        super().__init__()
        self.sources = {"": _sources, "videobooth": _released_sources}[compat]

    def forward(self, prompt: PromptTokens, condition: Condition) -> PromptTokens:
        words = condition.tokens
        if words is None:
            return prompt
        length, count = prompt.ids.shape[1], words.shape[1]
        sources = self.sources(prompt, count)
        index = torch.tensor(sources, device=words.device)  # b l, into [prompt; words]
        rows = torch.cat([prompt.embeddings, words.to(prompt.embeddings.dtype)], dim=1)
        ids = torch.cat([prompt.ids, prompt.ids.new_full((len(sources), count), -1)], dim=1)
        return replace(
            prompt,
            embeddings=rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1])),
            ids=ids.gather(1, index),
            spans=torch.where(index >= length, 1, 0),
        )


def _sources(prompt: PromptTokens, count: int) -> list[list[int]]:
    """Where each output position comes from: a prompt position, or ``l + j`` for word j. Of each row, b l."""
    return [_row(spans, count) for spans in prompt.spans.tolist()]


def _row(spans: list[int], count: int) -> list[int]:
    length, out = len(spans), []
    for position, span in enumerate(spans):
        if span == 0:
            out.append(position)
        elif position == 0 or spans[position - 1] != span:  # an occurrence begins
            out.extend(range(length, length + count))
    padding = [length - 1] * length  # after a subject longer than the words: the last token, the padding
    return (out + padding)[:length]


def _released_sources(prompt: PromptTokens, count: int) -> list[list[int]]:
    """The same by the released code's rule (golden: ``twice_*``, ``first_token_only_matches``)."""
    rows = zip(prompt.ids.tolist(), prompt.subjects.tolist(), strict=True)
    return [_released_row(ids, [token for token in subject if token >= 0], count) for ids, subject in rows]


def _released_row(ids: list[int], subject: list[int], count: int) -> list[int]:
    """The subject stands wherever its *first* token does, whatever follows; as many tokens as it has are taken out.

    Every occurrence is written at its place in the *original* prompt, the original tail after it: a later one
    overwrites the shifted tail of the one before, or its words. One that runs past the end leaves the tail as it was.
    """
    length, out = len(ids), list(range(len(ids)))
    past = max(len(subject) - count, 0)
    for start in (at for at, token in enumerate(ids) if token in subject[:1]):
        end = start + len(subject)
        if end <= length:
            tail = [*range(end, length), *range(length - past, length)]
            out[start + count :] = tail[: max(length - start - count, 0)]
        out[start : start + count] = range(length, length + min(count, length - start))
    return out


class TextKV(nn.Module):
    """A text attention's own keys and values for prompts that hold an image."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.to_k_global, self.to_v_global = site.copy_of("to_k"), site.copy_of("to_v")

    def forward(self, qkv: QKV, condition: Condition) -> QKV:
        text = qkv.segments[0]
        k, v = self.to_k_global(qkv.source), self.to_v_global(qkv.source)
        return replace(qkv, segments=(Segment(qkv.heads(k), qkv.heads(v), text.frames), *qkv.segments[1:]))


class TextProjection(nn.Module):
    """Without text attention the text enters by one projection: a copy of it is trained instead."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.projection = site.copy_of("projection")

    def forward(self, modulation: Modulation, condition: Condition) -> Modulation:
        return replace(modulation, vector=self.projection(modulation.source))
