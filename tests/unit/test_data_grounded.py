"""Grounded-SAM with tiny random networks, saved in transformers' format: the loading and the path of data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_booth.data.build.grounded import GroundedSam
from dit_booth.data.build.settings import SegmentSettings

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [grounded])")
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> SegmentSettings:
    root = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    save_detector(root / "detector")
    save_sam(root / "sam")
    return SegmentSettings(
        by="grounded-sam", detector=str(root / "detector"), sam=str(root / "sam"), min_score=0.0
    )


def save_detector(folder: Path) -> None:
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "cat", "dog"]
    (folder / "vocab.txt").write_text("\n".join(words))
    text = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    backbone = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.GroundingDinoConfig(
        backbone_config=backbone, text_config=text, num_queries=5, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        disable_custom_kernels=True, max_text_len=16,
    )  # fmt: skip
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    transformers.GroundingDinoProcessor(
        transformers.GroundingDinoImageProcessor(size={"shortest_edge": 128, "longest_edge": 192}),
        transformers.BertTokenizer(str(folder / "vocab.txt")),
    ).save_pretrained(folder)


def save_sam(folder: Path) -> None:
    vision = transformers.SamVisionConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8, output_channels=8,
        mlp_dim=8, window_size=2, global_attn_indexes=[0], num_pos_feats=4,
    )  # fmt: skip
    prompt = transformers.SamPromptEncoderConfig(
        hidden_size=8, image_size=32, patch_size=8, image_embedding_size=4, mask_input_channels=4
    )
    decoder = transformers.SamMaskDecoderConfig(
        hidden_size=8, mlp_dim=8, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=8
    )
    transformers.SamModel(
        transformers.SamConfig(
            vision_config=vision.to_dict(),
            prompt_encoder_config=prompt.to_dict(),
            mask_decoder_config=decoder.to_dict(),
        )
    ).save_pretrained(folder)
    image = transformers.SamImageProcessor(
        size={"longest_edge": 32}, pad_size={"height": 32, "width": 32}, mask_size={"longest_edge": 8}
    )
    transformers.SamProcessor(image).save_pretrained(folder)


def save_sam2(folder: Path) -> None:
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=8, image_size=[32, 32], blocks_per_stage=[1, 1, 2, 1], embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2], window_size_per_stage=[2, 2, 2, 2], global_attention_blocks=[3],
    )  # fmt: skip
    vision = transformers.Sam2VisionConfig(
        backbone_config=backbone.to_dict(), backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=8,
        backbone_feature_sizes=[[8, 8], [4, 4], [2, 2]],
    )  # fmt: skip
    prompt = transformers.Sam2PromptEncoderConfig(hidden_size=8, image_size=32, mask_input_channels=4)
    decoder = transformers.Sam2MaskDecoderConfig(
        hidden_size=8, mlp_dim=8, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=8
    )
    transformers.Sam2Model(
        transformers.Sam2Config(
            vision_config=vision.to_dict(),
            prompt_encoder_config=prompt.to_dict(),
            mask_decoder_config=decoder.to_dict(),
        )
    ).save_pretrained(folder)
    image = transformers.Sam2ImageProcessor(
        size={"height": 32, "width": 32}, mask_size={"height": 8, "width": 8}
    )
    transformers.Sam2Processor(image).save_pretrained(folder)


@pytest.mark.parametrize("sam", ["sam", "sam2"])
def test_a_noun_becomes_a_mask_of_the_frames_size(
    settings: SegmentSettings, sam: str, tmp_path: Path
) -> None:
    if sam == "sam2":
        save_sam2(tmp_path / sam)
        settings = replace(settings, sam=str(tmp_path / sam))
    segment = GroundedSam(settings)
    frame = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    found = segment(frame, "Cat")
    assert found is not None
    x0, y0, x1, y1 = found.box
    assert found.mask.shape == (40, 60) and found.mask.dtype == bool
    assert 0 <= x0 < x1 <= 60 and 0 <= y0 < y1 <= 40 and 0 < found.score < 1
    again = segment(frame, "Cat")
    assert again is not None and again.box == found.box and (again.mask == found.mask).all()
    assert GroundedSam(replace(settings, min_score=1.0))(frame, "cat") is None


def test_networks_that_cannot_be_loaded(settings: SegmentSettings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"segment\.sam is .* cannot be loaded .*transformers' format"):
        GroundedSam(replace(settings, sam=str(tmp_path)))
    with pytest.raises(ValueError, match=r"segment\.sam is .* \(it is of the kind grounding-dino"):
        GroundedSam(replace(settings, sam=settings.detector))
