"""LPIPS and DreamSim: the distances of their papers over given networks."""

import sys
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
import torchvision

from dit_booth.evaluation.case import Case
from dit_booth.evaluation.learned.perceptual import (
    dreamsim_distance,
    dreamsim_scorer,
    load_dreamsim,
    load_lpips,
    lpips_scorer,
)

torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """AlexNet's convolutions with random weights, under torchvision's names."""
    torch.manual_seed(0)
    with torch.device("meta"):  # its classifier is large and not used
        model = torchvision.models.alexnet(weights=None)
    features = model.features.to_empty(device="cpu")
    for parameter in features.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    file = tmp_path_factory.mktemp("alexnet") / "alexnet-owt-7be5be79.pth"
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, file)
    return features.eval(), file


def lpips_by_definition(features: torch.nn.Module, a: torch.Tensor, b: torch.Tensor) -> float:
    """Zhang et al. 2018, equation 1, with the linear weights of the package."""
    file = Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth"
    linear = torch.load(file, map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    total, layers = 0.0, []
    x, y = ((p - shift[:, None, None]) / scale[:, None, None] for p in (a, b))
    for index, layer in enumerate(features):
        x, y = layer(x), layer(y)
        if index in (1, 4, 7, 9, 11):  # after each ReLU
            layers.append((x.clone(), y.clone()))
    for index, (x, y) in enumerate(layers):
        unit_x, unit_y = (v / (v.square().sum(0, keepdim=True).sqrt() + 1e-10) for v in (x, y))
        weights = linear[f"lin{index}.model.1.weight"].flatten()
        total += float(((unit_x - unit_y).square() * weights[:, None, None]).sum(0).mean())
    return total


def test_lpips_is_its_definition(alexnet):
    features, file = alexnet
    score = lpips_scorer(load_lpips({"lpips": str(file)}))
    case = Case(
        video=random(2, 3, 70, 80), truth=random(2, 3, 70, 80, seed=1), image=random(3, 8, 8), caption=""
    )
    with torch.no_grad():
        pairs = zip(case.video, case.truth, strict=True)
        expected = [lpips_by_definition(features, a.clone(), b.clone()) for a, b in pairs]
    assert score(case)["lpips"] == pytest.approx(expected, rel=1e-4)
    same = Case(video=case.video, truth=case.video, image=case.image, caption="")
    assert score(same)["lpips"] == pytest.approx([0, 0], abs=1e-9)
    small = Case(video=random(2, 3, 16, 16), truth=random(2, 3, 16, 16, seed=1), image=case.image, caption="")
    assert (score(small)["lpips"] > 0).all()


def test_lpips_refuses_what_does_not_fit(alexnet, tmp_path):
    with pytest.raises(
        ValueError, match=r"--weights lpips=FILE \(the original is alexnet-owt-7be5be79.pth\)"
    ):
        load_lpips({})
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.pth")
    with pytest.raises(
        ValueError, match=r"lpips = .*vgg.pth holds the weights of another network: 9 missing"
    ):
        load_lpips({"lpips": str(tmp_path / "vgg.pth")})
    score = lpips_scorer(load_lpips({"lpips": str(alexnet[1])}))
    with pytest.raises(ValueError, match="prompt 'star' has none; drop lpips"):
        score(Case(video=random(2, 3, 64, 64), image=random(3, 8, 8), caption="", prompt="star"))


@pytest.mark.parametrize(("load", "name"), [(load_lpips, "lpips"), (load_dreamsim, "dreamsim")])
def test_an_absent_package_names_the_extra(load, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # as Python marks a module that cannot be imported
    with pytest.raises(ValueError, match=rf"{name} needs its package.*pip install 'dit-booth\[metrics\]'"):
        load({name: "file"})


def test_dreamsim_is_a_cosine_distance_of_resized_pictures():
    seen = []

    def embed(pictures: torch.Tensor) -> torch.Tensor:
        seen.append(pictures)
        return pictures.mean(dim=(2, 3))

    case = Case(video=random(3, 3, 30, 40), image=torch.ones(3, 20, 20), caption="")
    case.image[0, 4:12, 5:15] = -1.0
    scores = dreamsim_scorer(dreamsim_distance(embed))(case)
    assert all(x.shape[1:] == (3, 224, 224) and x.min() >= 0 and x.max() <= 1 for x in seen)
    prompt = ((case.image + 1) / 2).mean(dim=(1, 2)).numpy()
    for frame, value in zip(((case.video + 1) / 2).mean(dim=(2, 3)).numpy(), scores["dreamsim"], strict=True):
        cosine = float(frame @ prompt) / float(np.linalg.norm(frame) * np.linalg.norm(prompt))
        assert value == pytest.approx(1 - cosine, abs=2e-3)  # resizing and clamping move the means a little
    assert len(scores["dreamsim_crop"]) == 3


def test_dreamsim_never_downloads(tmp_path, monkeypatch):
    """Its package is not among those of the tests; an empty module stands for it, and is not called."""
    monkeypatch.setitem(sys.modules, "dreamsim", type(sys)("dreamsim"))
    (tmp_path / "ensemble_lora").mkdir()
    with pytest.raises(
        ValueError, match=r"it has no dino_vitb16_pretrain.pth, .*fill it where downloads are possible"
    ):
        load_dreamsim({"dreamsim": str(tmp_path)})
    assert [path.name for path in tmp_path.iterdir()] == ["ensemble_lora"]
