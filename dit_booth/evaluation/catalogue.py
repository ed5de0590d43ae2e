"""The metrics by name: label, unit, better direction, level and definition. Needs no PyTorch.

A metric's `level` says what one value belongs to: a `frame`, a `video`, or the `set` of a point's videos.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["frame", "video", "set"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric's description; `better`: +1 higher, -1 lower, 0 neither (context for other metrics)."""

    name: str
    label: str
    unit: str = ""
    better: int = 0
    digits: int = 3
    level: Level = "frame"
    about: str = ""


NETWORKS = {
    "clip": "CLIP",
    "dino": "DINO ViT-S/16",
    "dino_b": "DINO ViT-B/16",
    "dinov2": "DINOv2",
    "lite0": "EfficientNet-Lite0",
    "own": "own CLIP",
    "judge": "judges",
}
"""Feature networks by the prefix of their metrics' names."""


def _of_network(prefix: str, label: str) -> list[Metric]:
    """Return the metrics that every feature network has."""
    return [
        Metric(
            name=f"{prefix}_i",
            label=f"{label} image",
            better=1,
            about="cosine of the frame and the image prompt, whole pictures",
        ),
        Metric(
            name=f"{prefix}_i_crop",
            label=f"{label} image, cropped",
            better=1,
            about="cosine of the frame and the image prompt, both cropped to the subject",
        ),
        Metric(
            name=f"{prefix}_consistency",
            label=f"{label} consistency",
            digits=4,
            about="cosine of the frame and the one before; read beside motion: a still video has 1",
        ),
    ]


_METRICS = [
    Metric(name="appearance", label="Appearance", unit="ΔE", better=-1, digits=2,
           about="mean dE2000 between the frame and the true subject rendered in its best-fitting pose"),
    Metric(name="right_shape", label="Right shape", unit="share", better=1,
           about="1 if the true shape fits best of all shapes"),
    Metric(name="shape", label="Shape", better=1,
           about="overlap with the true shape: 0 at the mean of the wrong shapes, 1 at the ground truth"),
    Metric(name="right_texture", label="Right texture", unit="share", better=1,
           about="1 if the true texture fits best of all textures"),
    Metric(name="palette", label="Palette", unit="ΔE", better=-1, digits=2,
           about="earth mover's distance of the subject's colours and the image prompt's, dE2000"),
    Metric(name="subject_found", label="Subject found", unit="share", better=1,
           about="1 if a subject can be segmented"),
    *(metric for prefix, label in NETWORKS.items() for metric in _of_network(prefix, label)),
    Metric(name="clip_t", label="CLIP text", better=1, about="cosine of the frame and the caption"),
    Metric(name="own_t", label="own CLIP text", better=1,
           about="cosine of the frame and the caption, in the CLIP that the method is conditioned on"),
    Metric(name="judge_t", label="judges text", better=1,
           about="cosine of the frame and the caption, mean of the judges"),
    Metric(name="vbench_subject", label="VBench subject consistency", better=1, level="video",
           about="DINO ViT-B/16: mean over i of (cos(i-1, i) + cos(0, i)) / 2, at least 0; read beside motion"),
    Metric(name="vbench_background", label="VBench background consistency", better=1, level="video",
           about="the same with CLIP ViT-B/32; read beside motion"),
    Metric(name="vbench_flickering", label="VBench temporal flickering", better=1, digits=4, level="video",
           about="1 - mean absolute difference to the frame before, a share of the range; meant for static scenes"),
    Metric(name="vbench_i2v_subject", label="VBench-I2V subject", better=1, level="video",
           about="DINO ViT-B/16: 0.4 max cos(image prompt, i) + 0.3 mean + 0.3 min of cos(i-1, i)"),
    Metric(name="match_i", label="Crop and match", better=1,
           about="cosine of the image prompt and the best box that a given detector finds"),
    Metric(name="match_found", label="Crop and match, found", unit="share", better=1,
           about="1 if a box has confidence > 0.6 and a text similarity > 0.30"),
    Metric(name="nexus", label="NexusScore, corrected", better=1, level="video",
           about="mean cosine of the image prompt and the boxes that count, over 32 frames; 0 if none does"),
    Metric(name="nexus_released", label="NexusScore, as released", better=1, digits=4, level="video",
           about="NexusScore divided by the number of frames with a detection"),
    Metric(name="lpips", label="LPIPS", better=-1, about="AlexNet, to the real video's frame"),
    Metric(name="dreamsim", label="DreamSim", better=-1,
           about="distance of the frame and the image prompt, whole pictures"),
    Metric(name="dreamsim_crop", label="DreamSim, cropped", better=-1,
           about="distance of the frame and the image prompt, both cropped to the subject"),
    Metric(name="fvd", label="FVD", better=-1, digits=1, level="set",
           about="Fréchet distance to the real videos, I3D; compare equally many videos only"),
    Metric(name="fvd_videomae", label="FVD, VideoMAE", better=-1, digits=1, level="set",
           about="Fréchet distance to the real videos, VideoMAE; compare equally many videos only"),
    Metric(name="jedi", label="JEDi", better=-1, level="set",
           about="100 MMD of degree 2 to the real videos, V-JEPA; compare equally many videos only"),
    Metric(name="psnr", label="PSNR", unit="dB", better=1, digits=2,
           about="to the real video of the prompt; a pose or motion of its own counts as an error"),
    Metric(name="flicker", label="Background flicker", unit="share", better=-1, digits=4,
           about="mean absolute difference of the background's pixels to the frame before"),
    Metric(name="speed", label="Speed", unit="share", digits=4,
           about="distance of the subject's centre to the frame before, in shares of the frame's side"),
    Metric(name="growth", label="Growth", unit="share", digits=4,
           about="absolute change of the subject's size to the frame before, relative"),
    Metric(name="rotation", label="Rotation", unit="degrees", digits=2,
           about="absolute rotation of the subject to the frame before"),
    Metric(name="flow", label="Optical flow", unit="share", digits=4,
           about="mean length of the optical flow from the frame before, in shares of the frame's shorter side"),
    Metric(name="dynamic_degree", label="Dynamic degree", unit="share", level="video",
           about="1 if the video moves by VBench's rule, with another optical flow than VBench's unless RAFT is given"),
]  # fmt: skip
CATALOGUE: dict[str, Metric] = {metric.name: metric for metric in _METRICS}


def describe(name: str) -> Metric:
    """Return a metric's description; for an unknown name, one without a better direction."""
    return CATALOGUE.get(name) or Metric(name=name, label=name.replace("_", " "))
