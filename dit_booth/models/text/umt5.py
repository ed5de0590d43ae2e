"""umT5's encoder, which Wan reads (transformers underneath), with the `prompt` port before it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from safetensors import SafetensorError
from torch import Tensor, nn

from dit_booth.inject import Injection, PromptTokens, Site, no_injection
from dit_booth.models.clip.encoders import Text
from dit_booth.models.clip.tokenizer import Prompt
from dit_booth.models.text.config import TextConfig
from dit_booth.models.text.tokenizer import Umt5Tokenizer
from dit_booth.models.weights import Shards

KEPT = 256
"""Prompts whose states are kept, beside those of the batch at hand."""


class Umt5TextEncoder(nn.Module):
    """Prompts -> tokens (b l d), zero after the prompt's end, as diffusers' WanPipeline feeds them; pooled: their mean.

    The encoder itself is frozen, and no part of the model: it is neither trained, partitioned nor saved with it, like
    the autoencoder. It is loaded when a prompt is not known yet; `keep` makes prompts known.
    """

    like: Tensor
    null_prompt = ""
    """Wan's unconditional caption."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.frozen = FrozenUmt5(config)
        self.tokenizer = Umt5Tokenizer(load_tokenizer(config), config.length)
        self.length, self.width = config.length, self.frozen.width
        self.embed_dim = self.width
        self.site = Site(name="text.prompt", port="prompt", role="words", dim=self.width)
        self.register_buffer("like", torch.zeros(()), persistent=False)  # device and dtype of what it returns

    def sites(self) -> list[Site]:
        return [self.site]

    def tokenize(
        self,
        captions: Sequence[str],
        subjects: Sequence[str | None] | None = None,
        *,
        first_token_suffices: bool = False,
    ) -> Prompt:
        """See `Umt5Tokenizer.__call__`; the result lies on this module's device."""
        prompt = self.tokenizer(captions, subjects, first_token_suffices=first_token_suffices)
        return prompt.to(self.like.device)

    def forward(self, prompt: Prompt, inject: Injection = no_injection) -> Text:
        """Encode a prompt (b l) as tokens (b l d) and a pooled embedding (b d).

        The `prompt` port stands before the encoder: with a tap there, gradients pass through it to the tap's words.
        """
        if self.site.name in inject.taps:
            words = PromptTokens(self.embed(prompt.ids), prompt.ids, prompt.spans, prompt.subjects)
            words = inject(self.site, words)
            there = words.ids != self.tokenizer.padding  # b l
            longest = int(there.sum(1).max())  # padding is masked: it is cut off, and comes back as zeros
            tokens = self.frozen.encode(words.embeddings[:, :longest], there[:, :longest])
            tokens = F.pad(tokens, (0, 0, 0, self.length - longest))
        else:
            nothing = self.like.new_zeros(*prompt.ids.shape, 0)  # no tap looks at it
            inject(self.site, PromptTokens(nothing, prompt.ids, prompt.spans, prompt.subjects))
            there = prompt.ids != self.tokenizer.padding
            tokens = self.states(prompt.ids)
        tokens = tokens.to(self.like)
        counts = reduce(there.to(tokens.dtype), "b l -> b 1", "sum")
        return Text(tokens, reduce(tokens, "b l d -> b d", "sum") / counts)

    def embed(self, ids: Tensor) -> Tensor:
        """Return token embeddings (b l d) of ids (b l)."""
        return self.frozen.embed(ids)

    @torch.no_grad()
    def states(self, ids: Tensor) -> Tensor:
        """Return the encoder's output (b l d) for ids (b l), each row by itself, at its own length."""
        rows = [self.known(row) for row in self._rows(ids)]
        return torch.stack([F.pad(row.to(ids.device), (0, 0, 0, self.length - len(row))) for row in rows])

    def known(self, row: tuple[int, ...]) -> Tensor:
        """Return the states (n d) of a prompt's ids, which are encoded once."""
        if row not in self.frozen.kept:
            ids = torch.tensor([row], device=self.like.device)
            there = torch.ones_like(ids, dtype=torch.bool)
            self.frozen.keep({row: self.frozen.encode(self.embed(ids), there)[0]})
        return self.frozen.kept[row]

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> list[Tensor]:
        """Return the states of captions (n d each), without padding."""
        return [self.known(row) for row in self._rows(self.tokenize(captions).ids)]

    def keep(self, captions: Sequence[str], states: Sequence[Tensor]) -> None:
        """Make captions known by their states (n d each), as a cache of encoded data has them."""
        self.frozen.keep(dict(zip(self._rows(self.tokenize(captions).ids), states, strict=True)))

    def _rows(self, ids: Tensor) -> list[tuple[int, ...]]:
        """Return each row's ids, without the padding."""
        return [tuple(i for i in row if i != self.tokenizer.padding) for row in ids.tolist()]


class FrozenUmt5:
    """The encoder's weights, loaded at the first use, and the states of prompts; copies of a model share one."""

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self.width = read_width(config)
        self.kept: dict[tuple[int, ...], Tensor] = {}
        """Token ids -> states (n d), the latest last."""
        self._encoder: Any = None

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def keep(self, states: dict[tuple[int, ...], Tensor]) -> None:
        """Add states; the oldest ones go."""
        for row in states:
            self.kept.pop(row, None)
        self.kept |= states
        for row in list(self.kept)[: -(KEPT + len(states))]:
            del self.kept[row]

    def encoder(self, device: torch.device) -> Any:
        """Return the encoder on a device, loading it before its first use. ValueError: its weights do not fit."""
        if self._encoder is None:
            self._encoder = load_encoder(self.config)
        if next(self._encoder.parameters()).device != device:
            self._encoder = self._encoder.to(device)
        return self._encoder

    def embed(self, ids: Tensor) -> Tensor:
        """Return token embeddings (b l d) of ids (b l)."""
        embeddings: Tensor = self.encoder(ids.device).shared(ids)
        return embeddings

    def encode(self, embeddings: Tensor, there: Tensor) -> Tensor:
        """Return the last hidden state (b l d) of embeddings (b l d), zero where `there` (b l) is false."""
        encoder = self.encoder(embeddings.device)
        states: Tensor = encoder(inputs_embeds=embeddings, attention_mask=there.long()).last_hidden_state
        return states * rearrange(there, "b l -> b l 1")


# ---- files -------------------------------------------------------------------------------------------------


def load_tokenizer(config: TextConfig) -> Any:
    """Load the tokenizer. ValueError: it is not there, or has no offsets."""
    transformers = _transformers()
    source, local = _locate(config, config.tokenizer, "tokenizer_config.json")
    where = f"text.path = {config.path!r}, text.tokenizer = {config.tokenizer!r}"
    model = (
        transformers.UMT5Config()
    )  # else a config.json is looked for, which a tokenizer's folder does not have
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, config=model, **local)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{where} could not be loaded: {error}; give a folder with tokenizer.json"
        ) from error
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise ValueError(f"{where} has no tokenizer.json with a padding token; give umT5's")
    return tokenizer


def read_width(config: TextConfig) -> int:
    """Return the width of the encoder's states. ValueError: there is no encoder, or another model; a missing shard."""
    transformers = _transformers()
    source, local = _locate(config, config.subfolder, "config.json")
    try:
        found = transformers.AutoConfig.from_pretrained(source, **local)
    except (OSError, ValueError) as error:
        raise ValueError(f"{_where(config)} could not be read: {error}") from error
    if found.model_type != "umt5":
        raise ValueError(
            f"{_where(config)} holds {found.model_type}, not umt5; give a folder such as umt5-xxl"
        )
    if local["local_files_only"]:
        Shards.find(Path(source) / config.subfolder, "model")  # now, not when the encoder is first needed
    return int(found.d_model)


@functools.lru_cache(maxsize=1)  # the stages of a run build a model each
def load_encoder(config: TextConfig) -> nn.Module:
    """Load the encoder, frozen, strictly, from safetensors. ValueError: weights do not fit, or are not there."""
    transformers = _transformers()
    source, local = _locate(config, config.subfolder, "config.json")
    options = {"use_safetensors": True, "dtype": getattr(torch, config.dtype), "output_loading_info": True}
    try:
        encoder, found = transformers.UMT5EncoderModel.from_pretrained(source, **local, **options)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{_where(config)} could not be loaded: {error}; only safetensors weights are read, and a hub name needs"
            " the network or a filled cache"
        ) from error
    wrong = {name: sorted(map(str, keys))[:8] for name, keys in found.items() if keys}
    if wrong:
        raise ValueError(
            f"{_where(config)}: the weights do not fit UMT5EncoderModel: {wrong}; copy them again"
        )
    module: nn.Module = encoder
    return module.requires_grad_(False).eval()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "text.kind is umt5, which needs the package transformers: pip install 'dit-booth[wan]', or set text.kind"
            " to clip"
        ) from error
    return transformers


def _where(config: TextConfig) -> str:
    return f"text.path = {config.path!r}, text.subfolder = {config.subfolder!r}"


def _locate(config: TextConfig, subfolder: str, file: str) -> tuple[str, dict[str, Any]]:
    """Return the folder or hub name, and the arguments for transformers. ValueError: a folder without `file`."""
    if not config.path:
        raise ValueError(
            "text.path is empty, and weights is no pipeline's folder with text_encoder/ and tokenizer/: give a"
            " transformers folder of umT5, or a hub name"
        )
    path = Path(config.path).expanduser()
    if path.is_dir():
        if not (path / subfolder / file).is_file():
            raise ValueError(
                f"text.path is {config.path!r}, but {path / subfolder / file} does not exist; point to the folder that"
                " save_pretrained wrote, and set text.subfolder and text.tokenizer"
            )
        return str(path), {"subfolder": subfolder, "local_files_only": True}
    if path.is_absolute() or config.path.startswith(".") or config.path.count("/") != 1:
        raise ValueError(
            f"text.path is {config.path!r}, which does not exist; give a folder, or a hub name owner/name"
        )
    return config.path, {"subfolder": subfolder, "local_files_only": False}
