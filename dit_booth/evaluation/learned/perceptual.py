"""Learned distances of two pictures: LPIPS to the real video, DreamSim to the image prompt. Lower is better.

Both networks come from their authors' packages (`lpips`, `dreamsim`), which are imported only here.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from numpy.typing import NDArray
from torch import Tensor

from dit_booth.evaluation.case import Case, Scorer, Values
from dit_booth.evaluation.learned.crops import FindSubject, crop_subjects, find_on_smooth, find_on_white
from dit_booth.evaluation.learned.networks import Device, Weights
from dit_booth.evaluation.learned.weights import find_weights, load_strictly, read_weights

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches of pictures `n 3 h w` in [-1, 1] -> `n`."""

_LPIPS_SMALLEST = 64  # AlexNet's fifth layer needs about this many pixels
_DREAMSIM_SIDE = 224
_DREAMSIM_FILES = (
    "dino_vitb16_pretrain.pth",
    "open_clip_vitb16_pretrain.pth.tar",
    "clip_vitb16_pretrain.pth.tar",
    "ensemble_lora",
    "facebookresearch_dino_main",  # these two are torch.hub's copies, made where the package first ran
    "checkpoints/dino_vitbase16_pretrain.pth",
)


def load_lpips(weights: Weights, device: Device = "cpu") -> Distance:
    """Load LPIPS 0.1 with AlexNet (Zhang et al. 2018), the variant that its authors advise for comparing pictures.

    The linear layers come from the package; `weights["lpips"]` is torchvision's AlexNet
    (alexnet-owt-7be5be79.pth), whose classifier is not used. Pictures keep their size, and are enlarged to 64 pixels
    (shorter side, bilinear) if they are smaller.

    Raises:
        ValueError: the package or the weights are absent, or the weights are another network's.
    """
    package = _import("lpips", "pip install 'dit-booth[metrics]'")
    file = find_weights("lpips", weights.get("lpips"), example="alexnet-owt-7be5be79.pth")
    with warnings.catch_warnings():  # the package calls torchvision as it was
        warnings.simplefilter("ignore", UserWarning)
        model = package.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    own = {name.split(".", 1)[1]: name for name in model.net.state_dict()}  # 0.weight -> slice1.0.weight
    state = {k: v for k, v in read_weights(file).items() if not k.startswith("classifier.")}
    named = {own.get(k.removeprefix("features."), k): v for k, v in state.items()}
    load_strictly(model.net, named, f"weights lpips = {file}")
    model.eval().requires_grad_(False).to(device)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        values: Tensor = model(*(_enlarge(x.to(device)) for x in (a, b)))
        return rearrange(values, "n 1 1 1 -> n")

    return distance


def load_dreamsim(weights: Weights, device: Device = "cpu") -> Distance:
    """Load DreamSim's ensemble (Fu et al. 2023): 1 - cosine of the embeddings, after a bicubic resize to 224 x 224.

    `weights["dreamsim"]` is the folder that `dreamsim.dreamsim(cache_dir=FOLDER)` fills where it may download.

    Raises:
        ValueError: the package or a file of that folder is absent.
    """
    package = _import("dreamsim", "pip install 'dit-booth[metrics]'")
    folder = find_weights("dreamsim", weights.get("dreamsim"), example="dreamsim_ensemble_checkpoint")
    absent = [name for name in _DREAMSIM_FILES if not (folder / name).exists()]
    if absent:  # the package would download them
        raise ValueError(
            f"weights dreamsim = {folder}: it has no {', '.join(absent)}; fill it where downloads are possible:"
            f" python -c \"import dreamsim; dreamsim.dreamsim(device='cpu', cache_dir='{folder}')\""
        )
    model, _ = package.dreamsim(pretrained=True, device=str(device), cache_dir=str(folder))
    return dreamsim_distance(model.embed, device)


def dreamsim_distance(embed: Callable[[Tensor], Tensor], device: Device = "cpu") -> Distance:
    """Return DreamSim's distance over its embedding of pictures in [0, 1] at 224 x 224 (n d)."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        features = [embed(_to_dreamsim(x.to(device))) for x in (a, b)]
        return 1 - F.cosine_similarity(features[0], features[1], dim=-1)

    return distance


def lpips_scorer(distance: Distance) -> Scorer:
    """Return a scorer of `lpips`: the distance of every frame to the real video's. ValueError: a case has no truth."""

    def score(case: Case) -> Mapping[str, Values]:
        if case.truth is None:
            raise ValueError(
                f"lpips compares with the real video, and prompt {case.prompt!r} has none; drop lpips"
            )
        return {"lpips": _apply(distance, case.video, case.truth)}

    return score


def dreamsim_scorer(distance: Distance, find: FindSubject = find_on_smooth) -> Scorer:
    """Return a scorer of `dreamsim` and `dreamsim_crop`: every frame's distance to the image prompt."""

    def score(case: Case) -> Mapping[str, Values]:
        prompts = repeat(case.image, "c h w -> f c h w", f=len(case.video))
        target = crop_subjects(case.image[None], find_on_white)[0][None]
        cropped = [_apply(distance, crop[None], target)[0] for crop in crop_subjects(case.video, find)]
        return {"dreamsim": _apply(distance, case.video, prompts), "dreamsim_crop": np.array(cropped)}

    return score


@torch.no_grad()
def _apply(distance: Distance, a: Tensor, b: Tensor) -> NDArray[np.float64]:
    values: NDArray[np.float64] = distance(a.float(), b.float()).detach().cpu().double().numpy()
    return values


def _enlarge(pictures: Tensor) -> Tensor:
    scale = _LPIPS_SMALLEST / min(pictures.shape[-2:])
    return F.interpolate(pictures, scale_factor=scale, mode="bilinear") if scale > 1 else pictures


def _to_dreamsim(pictures: Tensor) -> Tensor:
    size = (_DREAMSIM_SIDE, _DREAMSIM_SIDE)
    return F.interpolate((pictures.clamp(-1, 1) + 1) / 2, size, mode="bicubic", antialias=True).clamp(0, 1)


def _import(name: str, fix: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{name} needs its package, which cannot be imported ({error}); install it: {fix}"
        ) from error
