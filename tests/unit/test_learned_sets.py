"""Distances between sets of videos: arithmetic, and video networks from files that the tests write."""

import logging

import numpy as np
import pytest
import torch
import transformers  # its classes are imported where they are used: seconds of every worker's collection
from scipy.linalg import sqrtm

from dit_booth.evaluation.case import Case
from dit_booth.evaluation.learned import build_set
from dit_booth.evaluation.learned.sets import frechet_distance, fvd_scorer, jedi, jedi_scorer, polynomial_mmd
from dit_booth.evaluation.learned.video_networks import load_i3d, load_videomae, load_vjepa

torch.set_num_threads(1)


def samples(n: int, d: int, seed: int, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def frechet_by_definition(a: np.ndarray, b: np.ndarray) -> float:
    root = sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
    traces = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False)) - 2 * np.trace(root).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + traces)


@pytest.mark.parametrize(("n", "m", "d"), [(50, 40, 6), (9, 30, 6), (7, 8, 6), (300, 200, 20)])
def test_frechet_distance_is_its_definition(n, m, d):
    a, b = samples(n, d, seed=0), samples(m, d, seed=1, scale=2)
    assert frechet_distance(a, b) == pytest.approx(frechet_by_definition(a, b), rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_frechet_distance_of_gaussians_on_axes():
    """Exact moments: mean m, variance v on each axis; distance |dm|^2 + sum (sqrt v - sqrt w)^2."""

    def set_of(mean, variance):
        corners = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], float)
        return corners * np.sqrt(np.array(variance) * 7 / 8) + mean

    a, b = set_of([0, 0, 0], [1, 4, 9]), set_of([1, 2, 3], [4, 1, 9])
    assert frechet_distance(a, b) == pytest.approx(14 + 1 + 1)


def test_frechet_distance_of_few_samples_of_many_channels():
    a = samples(
        6, 40, seed=0
    )  # covariances of rank 5: a matrix square root of their product is ill-conditioned
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(9 * 40)
    assert frechet_distance(1e4 * a, 1e4 * a + 1) == pytest.approx(40, abs=1e-3)


def test_mmd_is_its_definition():
    a, b = samples(7, 5, seed=0), samples(6, 5, seed=1)

    def kernel(x, y):
        return sum(float(p) * float(q) for p, q in zip(x, y, strict=True)) / 5

    def mean(xs, ys):
        return sum(kernel(x, y) ** 2 for x in xs for y in ys) / (len(xs) * len(ys))

    assert jedi(a, b) == pytest.approx(100 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)))
    assert jedi(a, a) == pytest.approx(0, abs=1e-9)


def test_mmd_gives_the_published_examples():
    """Those of the released code (videojedi/mmd_polynomial.py): of scikit-learn's default for gamma, and of gamma 1."""
    a = np.arange(1, 10).reshape(3, 3)
    b = np.array([[7, 6, 5], [4, 3, 2], [1, 1, 8], [0, 2, 5]])
    assert polynomial_mmd(a, b) == pytest.approx(270.7, abs=0.05)
    assert polynomial_mmd(a, b, gamma=1) == pytest.approx(2436.5, abs=0.05)


@pytest.mark.parametrize("distance", [frechet_distance, jedi])
def test_features_that_do_not_fit_are_refused(distance):
    a = samples(5, 3, seed=0)
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 2\)"):
        distance(a, a[:, :2])
    with pytest.raises(ValueError, match="at least 2"):
        distance(a[:1], a)
    with pytest.raises(ValueError, match="NaN"):
        distance(a * np.nan, a)


def cases(count: int, frames: int = 10, size: int = 24, truth: bool = True) -> list[Case]:
    made = []
    for seed in range(count):
        video = torch.rand(2, frames, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        image = torch.ones(3, 8, 8)
        made.append(
            Case(
                video=video[0], truth=video[1] if truth else None, image=image, caption="", prompt=f"p{seed}"
            )
        )
    return made


def test_sets_are_compared_with_the_real_videos(caplog):
    def features(videos: torch.Tensor) -> torch.Tensor:
        return videos.mean(dim=(3, 4)).flatten(1)[:, :4]

    given = cases(6)
    a, b = (
        torch.stack([features(v[None])[0] for v in videos]).double().numpy()
        for videos in ([c.video for c in given], [c.truth for c in given])
    )
    with caplog.at_level(logging.WARNING):
        assert fvd_scorer(features)(given) == {"fvd": pytest.approx(frechet_distance(a, b))}
    assert "over 6 videos is too high" in caplog.text
    assert "use 2048" in caplog.text
    assert jedi_scorer(features)(given) == {"jedi": pytest.approx(jedi(a, b))}
    with pytest.raises(ValueError, match=r"2 of 3 cases have none \(first: prompt 'p0'\)"):
        fvd_scorer(features)([*cases(2, truth=False), *cases(1)])


class I3d(torch.nn.Module):
    """The interface of StyleGAN-V's I3D: the options that FVD needs are off by default."""

    def forward(
        self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> torch.Tensor:
        assert not rescale and not resize and return_features
        assert x.shape[1] == 3 and x.shape[3:] == (224, 224)
        return x.mean(dim=(3, 4)).flatten(1)


class Vjepa(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1] == 3 and x.shape[3:] == (224, 224)
        return x.mean(dim=(2, 3, 4))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_i3d_gets_frames_as_fvd_prepares_them(tmp_path):
    file = tmp_path / "i3d_torchscript.pt"
    torch.jit.save(torch.jit.script(I3d()), file)
    features = load_i3d({"i3d": str(file)})
    wide = torch.full((1, 10, 3, 20, 40), 9.0)  # beyond the range
    wide[..., 10:30] = torch.linspace(-1, 1, 10)[
        :, None, None, None
    ]  # what the center crop keeps, but its edges
    expected = torch.linspace(-1, 1, 10).repeat(3)
    assert torch.allclose(features(wide)[0], expected, atol=0.06)
    with pytest.raises(ValueError, match="have 9 frames; I3D needs at least 10"):
        features(wide[:, :9])
    score = build_set("fvd", {"i3d": str(file)})
    assert score(cases(3))["fvd"] > 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_vjepa_gets_imagenet_statistics(tmp_path):
    file = tmp_path / "vjepa.pt"
    torch.jit.save(torch.jit.script(Vjepa()), file)
    white = load_vjepa({"vjepa": str(file)})(torch.ones(2, 4, 3, 16, 16))
    assert torch.allclose(
        white, ((1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]))
    )
    assert build_set("jedi", {"vjepa": str(file)})(cases(3))["jedi"] > 0


@pytest.mark.parametrize("load", [load_i3d, load_vjepa])
def test_files_that_are_no_torchscript_are_refused(load, tmp_path):
    option = "i3d" if load is load_i3d else "vjepa"
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth is no TorchScript file"):
        load({option: str(tmp_path / "weights.pth")})
    with pytest.raises(ValueError, match=f"--weights {option}=FILE"):
        load({})


TINY = {
    "image_size": 32, "patch_size": 16, "num_frames": 4, "hidden_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 5,
}  # fmt: skip


def test_videomae_features_are_what_its_classifier_reads(tmp_path):
    torch.manual_seed(0)
    model = transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**TINY)).eval()
    model.fc_norm.bias.data.uniform_()
    model.save_pretrained(tmp_path / "classifier")
    features = load_videomae({"videomae": str(tmp_path / "classifier")})
    videos = torch.rand(2, 7, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        logits = model(((videos[:, [0, 2, 4, 6]] + 1) / 2 - mean) / std).logits
        assert torch.allclose(model.classifier(features(videos)), logits, atol=1e-5)
    with pytest.raises(ValueError, match="have 3 frames; this VideoMAE needs 4"):
        features(videos[:, :3])
    transformers.VideoMAEModel(transformers.VideoMAEConfig(**TINY)).save_pretrained(tmp_path / "bare")
    assert load_videomae({"videomae": str(tmp_path / "bare")})(videos).shape == (2, 24)
    score = build_set("fvd_videomae", {"videomae": str(tmp_path / "classifier")})
    assert score(cases(3))["fvd_videomae"] > 0


def test_another_networks_folder_is_no_videomae(tmp_path):
    with pytest.raises(ValueError, match=r"no config.json"):
        load_videomae({"videomae": str(tmp_path)})
    model = transformers.VideoMAEModel(transformers.VideoMAEConfig(**TINY))
    model.save_pretrained(tmp_path)
    deeper = transformers.VideoMAEConfig(**{**TINY, "num_hidden_layers": 2})
    deeper.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"videomae = .*another network: .*missing \(encoder.layer.1"):
        load_videomae({"videomae": str(tmp_path)})
    wider = transformers.VideoMAEConfig(**{**TINY, "hidden_size": 32})
    wider.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"videomae = .*another network"):
        load_videomae({"videomae": str(tmp_path)})
