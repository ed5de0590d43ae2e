"""Builds an open_clip model from a configuration, with errors that name the fix."""

import functools
import json
import logging
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dit_booth.errors import suggest
from dit_booth.files import PACKAGE
from dit_booth.models.clip.config import ClipConfig
from dit_booth.models.upstream.clip import find_clip_mismatches, from_transformers
from dit_booth.models.weights import JsonObject, load_strictly, raise_mismatches, read_folder, read_json

log = logging.getLogger(__name__)

EMBEDDED_MODEL = "dit-booth-tiny"
EMBEDDED_WEIGHTS = PACKAGE / "assets" / "clip.safetensors"
_CONFIGS = Path(__file__).parent / "configs"
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_FIX = "choose a model such as ViT-L-14-quickgelu"


def model_settings(model: str) -> JsonObject | None:
    """Return the configuration of an open_clip model, or of one of ours, by name; None if there is none."""
    import open_clip

    _register_configs()
    settings: JsonObject | None = (
        open_clip.get_model_config(model) if model in open_clip.list_models() else None
    )
    return settings


def build_clip_model(config: ClipConfig) -> nn.Module:
    """Build the open_clip model, in fp32 and trainable.

    ValueError: an unknown model (nearest names given), a missing or unsafe weights file, weights that do not
    fit, or weights trained with another activation (OpenAI's need a `-quickgelu` model).
    """
    import open_clip

    _register_configs()
    if config.pretrained.startswith("local-dir:"):
        return _from_folder(config)
    settings = model_settings(config.model)
    if settings is None:
        raise ValueError(
            f"ClipConfig.model = {config.model!r} is not an open_clip model"
            f"{suggest(config.model, open_clip.list_models())}; open_clip.list_models() lists all"
        )
    _check_is_clip(config.model, settings)
    tag = open_clip.get_pretrained_cfg(config.model, config.pretrained)
    if tag:
        _check_activation(config, settings, tag)
    if not tag and Path(config.pretrained).expanduser().is_dir():
        return _from_transformers_folder(config)
    source = config.pretrained if tag else _find_weights(config)
    try:
        # Strict, and a pickle is read by torch's weights-only unpickler.
        model: nn.Module = open_clip.create_model(config.model, pretrained=source, weights_only=True)
    except (RuntimeError, OSError, pickle.UnpicklingError, SafetensorError) as error:
        fix = "offline: give a local .safetensors file" if tag else "save the weights as .safetensors"
        raise ValueError(
            f"ClipConfig.pretrained = {config.pretrained!r} could not be loaded into model = "
            f"{config.model!r} (only plain tensors that fit it are read): {error}; {fix}"
        ) from error
    return model


def clip_state_dict(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the weights of a model from `build_clip_model` on the CPU, for `safetensors.torch.save_file`.

    `ClipConfig(pretrained=<that file>)` reads them back, in fp32 whatever `dtype` they were stored in.
    """
    return {name: value.detach().to("cpu", dtype).contiguous() for name, value in model.state_dict().items()}


@functools.cache
def _register_configs() -> None:
    import open_clip

    open_clip.add_model_config(_CONFIGS)


def _check_is_clip(name: str, settings: JsonObject) -> None:
    text = settings["text_cfg"]
    if text.get("hf_model_name") or text.get("hf_tokenizer_name") or "multimodal_cfg" in settings:
        raise ValueError(f"ClipConfig: {name!r} has another tokenizer or text tower than CLIP's: {_FIX}")


def _check_activation(config: ClipConfig, settings: JsonObject, tag: JsonObject) -> None:
    """QuickGELU weights in a GELU tower, or the reverse, give wrong features without any other sign."""
    trained, built = bool(tag.get("quick_gelu")), bool(settings.get("quick_gelu"))
    if trained != built:
        plain = config.model.removesuffix("-quickgelu")
        raise ValueError(
            f"ClipConfig.pretrained = {config.pretrained!r} was trained {'with' if trained else 'without'} "
            f"QuickGELU, but model = {config.model!r} is built {'with' if built else 'without'} it: use "
            f"model = {plain + '-quickgelu' if trained else plain!r}"
        )


def _find_weights(config: ClipConfig) -> str | None:
    """Return the local file that `pretrained` names; None for random weights (open_clip warns)."""
    import open_clip

    source = config.pretrained
    if source == "none":
        return None
    if source == "embedded":
        if config.model != EMBEDDED_MODEL:
            raise ValueError(
                f"ClipConfig.pretrained = 'embedded' is {EMBEDDED_MODEL} only, not model = {config.model!r}: "
                "give an open_clip tag (openai), a local file, or local-dir:/path"
            )
        if not EMBEDDED_WEIGHTS.is_file():
            raise ValueError(
                f"ClipConfig.pretrained = 'embedded': {EMBEDDED_WEIGHTS} is missing: reinstall the package, "
                "or set pretrained = none"
            )
        return str(EMBEDDED_WEIGHTS)
    path = Path(source).expanduser()
    if not path.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(config.model)) or "none"
        raise ValueError(
            f"ClipConfig.pretrained = {source!r} is neither a file nor a tag of {config.model} (its tags: "
            f"{tags}): give one of them, an existing .safetensors file, a transformers folder, embedded, "
            "local-dir:/path or none"
        )
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"ClipConfig.pretrained = {source!r}: the file must end in {', '.join(_SUFFIXES)}")
    return str(path)


def _from_folder(config: ClipConfig) -> nn.Module:
    """Build from `local-dir:/path`: an open_clip folder with `open_clip_config.json` and a weights file."""
    import open_clip

    where = f"ClipConfig.pretrained = {config.pretrained!r}"
    folder = Path(config.pretrained.removeprefix("local-dir:")).expanduser()
    if not (folder / "open_clip_config.json").is_file():
        raise ValueError(f"{where}: {folder}/open_clip_config.json does not exist: give an open_clip folder")
    if not any(path.suffix in _SUFFIXES[:3] for path in folder.iterdir()):
        raise ValueError(f"{where}: {folder} holds no .safetensors, .bin or .pth file: add the weights")
    settings = json.loads((folder / "open_clip_config.json").read_text())
    _check_is_clip(config.pretrained, settings["model_cfg"])
    log.info("CLIP's configuration comes from %s; model = %s is not used", folder, config.model)
    try:
        model: nn.Module = open_clip.create_model(f"local-dir:{folder}", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(f"{where} could not be loaded: {error}; save the weights as .safetensors") from error
    return model


def _from_transformers_folder(config: ClipConfig) -> nn.Module:
    """Build from a folder of transformers' CLIPModel with `config.json`, such as openai/clip-vit-large-patch14."""
    import open_clip

    folder = Path(config.pretrained).expanduser()
    where = f"ClipConfig.pretrained = {config.pretrained!r}"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{where}: {folder}/config.json does not exist: give a transformers folder of CLIP")
    settings = read_json(folder / "config.json")
    if not {"text_config", "vision_config"} <= set(settings):
        raise ValueError(
            f"{where} holds {settings.get('architectures', 'no CLIPModel')}, not a CLIPModel with both towers: "
            "give a folder such as clip-vit-large-patch14"
        )
    model: nn.Module = open_clip.create_model(config.model, load_weights=False)
    towers = {
        "text_config": model.get_submodule("transformer"),
        "vision_config": model.get_submodule("visual.transformer"),
    }
    mismatches = [
        line for name, tower in towers.items() for line in find_clip_mismatches(settings[name], tower)
    ]
    raise_mismatches(mismatches, where, "choose the clip.model that it is")
    state = from_transformers(read_folder(folder, "model", "pytorch_model"))
    load_strictly(model, state, where, fix=f"model = {config.model!r} may be another size: {_FIX}")
    return model
