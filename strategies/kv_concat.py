"""K/V concat: cross-frame attention also reads the reference's keys and values (VideoBooth section 3.3, eqs 5-6)."""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from dit_booth.anchors import At, check_place
from dit_booth.attention import FramePlan, Segment, attend
from dit_booth.attention.cover import put, take
from dit_booth.errors import check_ranges
from dit_booth.inject import KV, QKV, Condition, Hidden, Needs, Place, Reference, Site, Sites
from dit_booth.strategy import AnchoredConfig, Strategy, register

from .parts.low_rank import adapt_reference


@dataclass(frozen=True, kw_only=True)
class KVConcatConfig(AnchoredConfig):
    where: str = "*"
    """Glob over the cross-frame attentions that read the image."""
    update: Literal["first_frame_value", "direct"] = "first_frame_value"
    """The image updates the values of the frames it reaches (the paper), or those frames read it directly."""
    reference_at: At = "first"
    """Frames that the image reaches: the first (the paper), keyframes, or all; counted from the video's start."""
    reference_noise: Literal["matched", "clean"] = "matched"
    """Noise the reference to the video's timestep (the paper), or keep it clean."""
    reference_frames: int = 1
    """Copies of the reference, each with noise of its own, that pass the network as a video; the first one is read.
    The paper needs 1; the released code runs as many as the video has frames (docs/fidelity.md)."""
    train_frame_kv: bool = True
    """Give the frames keys and values of their own to train (the paper), or keep the backbone's."""
    projections: Literal["copies", "low_rank"] = "copies"
    """Project the reference by trained copies (the paper), or by the backbone's layers with low-rank changes of
    queries, keys and values in the reference's own pass (Stand-In; train_frame_kv must be false)."""
    rank: int = 128
    """low_rank: rank of the changes."""
    reference_place: Place = "backbone"
    """Rotary place of the reference's keys: the backbone's own, before frame 0, or beyond the video (docs/lora.md)."""

    def __post_init__(self) -> None:
        self.check_anchors("kv_concat")
        check_ranges(self, "kv_concat", reference_frames="[1, 100000]", rank="[1, 65536]")
        if self.projections == "low_rank" and self.train_frame_kv:
            raise ValueError("kv_concat.projections is low_rank; set kv_concat.train_frame_kv to false")
        if self.reference_frames > 1 and self.reference_noise == "clean":
            raise ValueError(
                f"kv_concat.reference_frames is {self.reference_frames} with reference_noise=clean (all equal); use 1"
            )


@register("kv_concat")
class KVConcat(Strategy):
    """Cross-frame attention reads the reference's keys and values (VideoBooth's fine stage)."""

    Config = KVConcatConfig
    trains = {"fine": ("*",), "joint": ("*",)}

    def __init__(self, config: KVConcatConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        self.noise, self.copies = config.reference_noise, config.reference_frames
        chosen = sites.match(config.where, port="qkv", role="cross_frame")
        check_place("kv_concat.reference_place", config.reference_place, chosen)
        self.readers = {site.name: self.attach(site, ReferenceKV(site, config)) for site in chosen}
        self.low_rank = config.projections == "low_rank"
        if self.low_rank:
            adapt_reference(self, sites, chosen, config.rank)

    def needs(self) -> Needs:
        projected = [f"{at}.{layer}" for at in self.readers for layer in ("to_k", "to_v")]
        return Needs(projected if self.low_rank else tuple(self.readers), self.noise, self.copies)

    def forward(self, reference: Reference, hidden: Hidden) -> Condition:
        if self.low_rank:
            return Condition(at={at: KV(hidden[f"{at}.to_k"], hidden[f"{at}.to_v"]) for at in self.readers})
        return Condition(at={at: reader.project(hidden[at]) for at, reader in self.readers.items()})


class ReferenceKV(nn.Module):
    """Keys and values of the reference, and (the paper) new ones of the frames; all start as the backbone's own."""

    def __init__(self, site: Site, config: KVConcatConfig) -> None:
        super().__init__()
        self.config = config
        if config.projections == "copies":
            self.to_k_exemplar, self.to_v_exemplar = site.copy_of("to_k"), site.copy_of("to_v")
        if config.train_frame_kv:
            self.to_k_new, self.to_v_new = site.copy_of("to_k"), site.copy_of("to_v")

    def project(self, hidden: Tensor) -> KV:
        """Project the reference's hidden state (b m c) to K_I and V_I."""
        return KV(self.to_k_exemplar(hidden), self.to_v_exemplar(hidden))

    def forward(self, qkv: QKV, image: KV | None) -> QKV:
        frames = qkv.segments[0]
        if self.config.train_frame_kv:
            frames = replace(frames, k=qkv.keys(self.to_k_new(qkv.x)), v=qkv.heads(self.to_v_new(qkv.x)))
        qkv = replace(qkv, segments=(frames, *qkv.segments[1:]))
        if image is None:
            return qkv
        if self.config.update == "direct":
            return qkv.reading_image(image, place=self.config.reference_place)
        v_new = self.updated_values(qkv, frames, image)
        return replace(qkv, segments=(replace(frames, v=v_new), *qkv.segments[1:]))

    def updated_values(self, qkv: QKV, frames: Segment, kv: KV) -> Tensor:
        """Compute equation 5: V_i' = Attn(Q_i, [K_I; K_i], [V_I; V_i]) for the frames i that the image reaches."""
        readers = qkv.readers or (True,) * qkv.q.shape[1]
        reached = tuple((i,) for i, reads in enumerate(readers) if reads)
        if not reached:  # a part of a long video between two keyframes
            return frames.v
        q, k, v = (take(x, reached) for x in (qkv.q, frames.k, frames.v))
        image = qkv.image(kv, ((0,),) * q.shape[1], self.config.reference_place)
        if image.query is not None:
            image = replace(image, query=take(image.query, reached))
        own = Segment(k, v, FramePlan("self").frames(q.shape[1]))
        values = attend(q, (image, own), qkv.layer.kernel).to(v.dtype)
        updated = frames.v.clone()
        put(updated, reached, values)
        return updated
