"""CLIP: the text tower with the `prompt` port, and the image tower's hidden states (open_clip underneath)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dit_booth.inject import Injection, PromptTokens, Site, no_injection
from dit_booth.models.clip.config import ClipConfig
from dit_booth.models.clip.tokenizer import NULL_PROMPT, Prompt, Tokenizer
from dit_booth.models.clip.weights import build_clip_model, clip_state_dict

__all__ = [
    "NULL_PROMPT",
    "ClipConfig",
    "ImageEncoder",
    "ImageStates",
    "Prompt",
    "Text",
    "TextEncoder",
    "Tokenizer",
    "build_clip",
    "build_clip_model",
    "clip_state_dict",
    "contrastive_forward",
]


class Text(NamedTuple):
    """Output of the text tower. A tuple, because ZeRO-3 looks for a module's outputs in tuples only."""

    tokens: Tensor  # b l d, after the final layer norm (transformers' `last_hidden_state`)
    pooled: Tensor  # b e, the end token's state through the text projection, not normalised


@dataclass(frozen=True)
class ImageStates:
    """Output of the image tower."""

    states: tuple[Tensor, ...]  # five of b (1 n) d: last, then after 4, 8, 12, 16 of 24 layers; no final norm
    embedding: Tensor  # b e, projected, not normalised


class TextTower(Protocol):
    """The parts of an open_clip text tower that `TextEncoder` takes over."""

    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    transformer: nn.Module
    ln_final: nn.Module
    attn_mask: Tensor | None


class TextEncoder(nn.Module):
    """The text tower of an open_clip model; parameter names are open_clip's."""

    attn_mask: Tensor | None
    null_prompt = NULL_PROMPT
    """The unconditional caption."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tower = cast(TextTower, getattr(model, "text", model))
        pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
        projection = getattr(tower, "text_projection", None)
        if pool not in ("argmax", "eos") or not isinstance(projection, nn.Parameter):
            raise ValueError(
                "ClipConfig.model: this text tower is not CLIP's (end-token pooling and a bias-free "
                "projection are needed): choose a model such as ViT-L-14-quickgelu"
            )
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.transformer = tower.transformer
        self.ln_final = tower.ln_final
        self.text_projection = projection
        self.register_buffer("attn_mask", tower.attn_mask, persistent=False)
        self.context_length, self.width = self.positional_embedding.shape
        self.embed_dim = projection.shape[1]
        self.tokenizer = Tokenizer(self.context_length, self.token_embedding.num_embeddings)
        self.site = Site(name="text.prompt", port="prompt", role="words", dim=self.width)

    def sites(self) -> list[Site]:
        return [self.site]

    def tokenize(
        self,
        captions: Sequence[str],
        subjects: Sequence[str | None] | None = None,
        *,
        first_token_suffices: bool = False,
    ) -> Prompt:
        """See `Tokenizer.__call__`; the result lies on this module's device."""
        prompt = self.tokenizer(captions, subjects, first_token_suffices=first_token_suffices)
        return prompt.to(self.positional_embedding.device)

    def forward(self, prompt: Prompt, inject: Injection = no_injection) -> Text:
        """Encode a prompt (b l) as tokens (b l d) and a pooled embedding (b e).

        The `prompt` port stands between the token embedding and the positions. A tap that shifts the
        embeddings shifts `ids` alike; if it pushed the end token out, the last position is pooled.
        """
        words = PromptTokens(self.token_embedding(prompt.ids), prompt.ids, prompt.spans, prompt.subjects)
        words = inject(self.site, words)
        x, length = words.embeddings, words.embeddings.shape[1]  # b l d
        assert length <= self.context_length, f"{length} tokens for {self.context_length} positions"
        x = x + self.positional_embedding[:length].to(x.dtype)
        mask = None if self.attn_mask is None else self.attn_mask[:length, :length]
        tokens = self.ln_final(self.transformer(x, attn_mask=mask))
        ends = words.ids == self.tokenizer.end  # b l
        last = torch.where(ends.any(dim=1), ends.int().argmax(dim=1), length - 1)  # the first end token
        pooled = tokens[torch.arange(len(tokens), device=tokens.device), last] @ self.text_projection
        return Text(tokens, pooled)


class ImageEncoder(nn.Module):
    """The image tower (a ViT) of an open_clip model, always in eval mode; parameter names are open_clip's."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        from open_clip.transformer import VisionTransformer

        visual = model.visual
        if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
            raise ValueError(
                f"ClipConfig.model: the image tower {type(visual).__name__} is not CLIP's vision "
                "transformer: choose a model such as ViT-L-14-quickgelu"
            )
        self.visual = visual
        weight = visual.conv1.weight
        for name in ("mean", "std"):
            value = torch.tensor(getattr(visual, f"image_{name}"), dtype=weight.dtype, device=weight.device)
            self.register_buffer(name, rearrange(value, "c -> c 1 1"), persistent=False)
        self.width, self.embed_dim = visual.proj.shape
        self.tokens = 1 + visual.grid_size[0] * visual.grid_size[1]
        depth = len(visual.transformer.resblocks)
        self.layers = (depth, *(max(1, (2 * depth * k + 24) // 48) for k in (4, 8, 12, 16)))
        """Layers that each state has passed: 24, 4, 8, 12, 16 for ViT-L/14, the same fractions elsewhere."""
        self.eval()

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Stay in eval mode."""
        return super().train(False)

    def preprocess(self, image: Tensor) -> Tensor:
        """Prepare an image (b 3 h w, [-1, 1]) for the tower: antialiased bicubic resize, clamp, mean and std.

        A non-square image is squashed (CLIP's own centre crop would lose its borders): pad a reference image
        to a square first. ValueError: another shape.
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"image has shape {tuple(image.shape)}: expected (b, 3, h, w) in [-1, 1]")
        image = image if image.dtype == torch.float64 else image.float()
        image = (image + 1) / 2
        if tuple(image.shape[-2:]) != self.visual.image_size:
            image = F.interpolate(image, self.visual.image_size, mode="bicubic", antialias=True)
        return (image.clamp(0, 1).to(self.mean.dtype) - self.mean) / self.std

    def forward(self, image: Tensor) -> ImageStates:
        """Encode an image (b 3 h w, [-1, 1]) as five hidden states (b (1 n) d, class token first), embedding (b e).

        The states are VideoBooth's, in its order: the last hidden state without the final layer norm, then
        the outputs of layers 4, 8, 12, 16 of 24 (section 3.2; ELITE's global mapping).
        """
        wanted = sorted({layer - 1 for layer in self.layers})
        out = self.visual.forward_intermediates(
            self.preprocess(image), indices=wanted, output_fmt="NLC", output_extra_tokens=True
        )
        parts = zip(wanted, out["image_intermediates_prefix"], out["image_intermediates"], strict=True)
        after = {layer + 1: torch.cat((prefix, patches), dim=1) for layer, prefix, patches in parts}
        return ImageStates(tuple(after[layer] for layer in self.layers), out["image_features"])


def build_clip(config: ClipConfig) -> tuple[TextEncoder, ImageEncoder]:
    """Build both towers of one open_clip model, frozen and in eval mode. Errors: see `build_clip_model`."""
    model = build_clip_model(config).requires_grad_(False).eval()
    return TextEncoder(model).eval(), ImageEncoder(model)


def contrastive_forward(model: nn.Module, images: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the features for contrastive training of a model from `build_clip_model`.

    Images (b 3 h w, [-1, 1]) and captions (b l) -> image features and text features (b e, unit length), and
    the exponentiated logit scale (a scalar).
    """
    image = F.normalize(ImageEncoder(model)(images).embedding, dim=-1)
    text = F.normalize(TextEncoder(model)(prompt).pooled, dim=-1)
    return image, text, cast(Tensor, model.logit_scale).exp()
