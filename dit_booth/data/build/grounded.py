"""Grounded-SAM: Grounding DINO finds the box of a noun, SAM the mask in the box.

Grounding DINO: arXiv 2303.05499. SAM: arXiv 2304.02643; SAM 2: arXiv 2408.00714. All through transformers, from the hub
or a local folder, whose configuration tells which SAM it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dit_booth.data.build.segment import Found
from dit_booth.data.build.settings import SegmentSettings
from dit_booth.data.image_files import Pixels


class GroundedSam:
    """The two networks, frozen.

    Raises:
        ValueError: transformers is not installed, or a network cannot be loaded.
    """

    def __init__(self, settings: SegmentSettings) -> None:
        self.settings = settings
        detector, sam = load_networks(settings.detector, "detector"), load_networks(settings.sam, "sam")
        self.detector_processor, self.detector = detector[0], detector[1].to(settings.device).eval()
        self.sam_processor, self.sam = sam[0], sam[1].to(settings.device).eval()

    @torch.no_grad()
    def __call__(self, frame: Pixels, noun: str, folders: object = ()) -> Found | None:
        """Return the mask of the noun's best box; None: no box has the score `min_score`."""
        found = self.detect(frame, noun)
        if found is None:
            return None
        box, score = found
        inputs = self.sam_processor(images=frame, input_boxes=[[box]], return_tensors="pt").to(
            self.settings.device
        )
        out = self.sam(**inputs, multimask_output=False)
        sizes = ("original_sizes", "reshaped_input_sizes")  # SAM 2 has no padding, hence the first alone
        (masks,) = self.sam_processor.post_process_masks(
            out.pred_masks.cpu(), *(inputs[name].cpu() for name in sizes if name in inputs)
        )
        mask = masks[0, 0].numpy().astype(bool)
        height, width = mask.shape
        x0, y0, x1, y1 = box
        inside = max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1)
        return Found(mask, inside, score)

    def detect(self, frame: Pixels, noun: str) -> tuple[list[float], float] | None:
        """Return the box of the highest score, x0 y0 x1 y1 in pixels, and the score."""
        text = f"{noun.lower()}."  # the network was trained on lower case, phrases ended by dots
        inputs = self.detector_processor(images=frame, text=text, return_tensors="pt").to(
            self.settings.device
        )
        (found,) = self.detector_processor.post_process_grounded_object_detection(
            self.detector(**inputs),
            inputs["input_ids"],
            threshold=self.settings.min_score,
            text_threshold=0.0,
            target_sizes=[frame.shape[:2]],
        )
        if not len(found["scores"]):
            return None
        best = int(found["scores"].argmax())
        return [float(edge) for edge in found["boxes"][best]], float(found["scores"][best])


def load_networks(source: str, kind: str) -> tuple[Any, Any]:
    """Load a processor and its network; only safetensors are read.

    Raises:
        ValueError: naming the setting, and what failed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "transformers is not installed, which segment.by=grounded-sam needs; pip install dit-booth[grounded]"
        ) from error
    names = {
        "grounding-dino": ("GroundingDinoProcessor", "GroundingDinoForObjectDetection"),
        "sam": ("SamProcessor", "SamModel"),
        "sam2": ("Sam2Processor", "Sam2Model"),
        "sam2_video": ("Sam2Processor", "Sam2Model"),  # as the released weights of SAM 2 say
    }
    place = {"local_files_only": Path(source).is_dir()}
    try:
        found = transformers.AutoConfig.from_pretrained(source, **place).model_type
        if (found == "grounding-dino") != (kind == "detector") or found not in names:
            raise ValueError(f"it is of the kind {found}")
        processor, network = (getattr(transformers, name) for name in names[found])
        return (
            processor.from_pretrained(source, **place),
            network.from_pretrained(source, use_safetensors=True, **place),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"segment.{kind} is {source!r}, which cannot be loaded ({str(error).splitlines()[0]}); give a local "
            "folder in transformers' format, or a hub name and a network connection"
        ) from error
