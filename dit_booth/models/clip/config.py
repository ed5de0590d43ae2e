"""Options of CLIP. Standard library only: `--help` stays fast."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """The CLIP model that encodes the text and the reference image."""

    model: str = "dit-booth-tiny"
    """An open_clip model name, e.g. `ViT-L-14-quickgelu` (Stable Diffusion 1's), or our `dit-booth-tiny`."""

    pretrained: str = "embedded"
    """Weights: `embedded` (in the package; dit-booth-tiny only), an open_clip tag such as `openai`
    (downloaded), a local .safetensors or .pt file of open_clip's, a transformers folder
    (`path/to/clip-vit-large-patch14`), `local-dir:/path` (an open_clip folder, whose own configuration
    replaces `model`), or `none` (random)."""
