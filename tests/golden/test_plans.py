"""Frame plans and attention taps against the bare attentions of the original codes."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange, repeat
from files import has, load
from torch import Tensor, nn

from dit_booth.attention import FramePlan, Segment, attend
from dit_booth.attention.plans import seen_by_all
from dit_booth.inject import Condition, Injection, Role, no_injection
from dit_booth.models.layers import Attention
from strategies.kv_concat import KVConcatConfig, ReferenceKV
from strategies.token_replacement import TextKV

torch.set_num_threads(1)
TOLERANCE = 2e-5
HEADS, VIDEOS = 3, 2


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not has(name), reason=f"golden file {name} is not here")


class Golden:
    """An original attention's weights in ours, and its inputs; the originals fold frames into the batch."""

    def __init__(self, name: str, module: str, role: Role = "cross_frame") -> None:
        self.tensors = load(name)[1]
        self.weights = {
            key.removeprefix(f"weights.{module}."): x
            for key, x in self.tensors.items()
            if key.startswith(f"weights.{module}.")
        }
        width, source = self.weights["to_k.weight"].shape
        self.attention = Attention(module, role, width, HEADS, source)
        self.take(self.attention)

    def take(self, module: nn.Module) -> None:
        """Load a module's parameters from the original's, all of them."""
        module.load_state_dict(
            {k: self.weights[k.replace("to_out.", "to_out.0.")] for k in module.state_dict()}
        )

    def video(self, key: str, videos: int = VIDEOS) -> Tensor:
        return rearrange(self.tensors[key], "(b f) n c -> b f n c", b=videos)

    @torch.no_grad()
    def run(self, x: Tensor, source: Tensor, plan: str | None, tap: Injection = no_injection) -> Tensor:
        frames = seen_by_all(x.shape[1]) if plan is None else FramePlan(plan).frames(x.shape[1])
        return self.attention(x, source, frames, tap)

    def error(self, ours: Tensor, output: str) -> float:
        theirs = self.tensors[f"outputs.{output}"]
        return (rearrange(ours, "b f n c -> (b f) n c") - theirs).abs().max().item()


@needs("tune_a_video")
def test_tune_a_video_reads_first_and_previous() -> None:
    golden = Golden("tune_a_video", "attn")
    x = golden.video("inputs.hidden_states")
    assert golden.error(golden.run(x, x, "first+previous"), "out") <= TOLERANCE
    assert golden.error(golden.run(x, x, "self+first"), "out") > 100 * TOLERANCE
    flat = rearrange(golden.tensors["inputs.hidden_states"][:VIDEOS], "b n c -> b 1 n c")
    assert golden.error(golden.run(flat, flat, "first+previous"), "out_f1") <= TOLERANCE


@needs("text2video_zero")
def test_text2video_zero_reads_the_first_frame() -> None:
    golden = Golden("text2video_zero", "self")
    x = golden.video("inputs.hidden_states")
    assert golden.error(golden.run(x, x, "first"), "self") <= TOLERANCE


@needs("text2video_zero")
def test_text2video_zero_reads_the_text_of_each_frame() -> None:
    golden = Golden("text2video_zero", "cross", "text")
    x, text = golden.video("inputs.hidden_states"), golden.video("inputs.encoder_hidden_states")
    assert golden.error(golden.run(x, text, "self"), "cross") <= TOLERANCE


@needs("videobooth_attention")
@pytest.mark.parametrize("output", ["fine", "none", "fine_f1"])
def test_videobooth_reads_the_reference(output: str) -> None:
    golden = Golden("videobooth_attention", "self")
    tap = ReferenceKV(golden.attention.site, KVConcatConfig())
    golden.take(tap)
    x = golden.video("inputs.hidden_states")
    reference = golden.video("inputs.exemplar_latent")[:, 0]
    if output == "fine_f1":
        x, reference = x[:1, :1], reference[:1]
    condition = Condition() if output == "none" else Condition(hidden={"self": reference})
    inject = Injection({"self": [(tap, condition)]})
    assert golden.error(golden.run(x, x, "first+previous", inject), output) <= TOLERANCE


@needs("videobooth_attention")
def test_videobooth_text_attention_of_the_coarse_stage() -> None:
    golden = Golden("videobooth_attention", "cross", "text")
    tap = TextKV(golden.attention.site)
    golden.take(tap)
    x, text = golden.video("inputs.hidden_states"), golden.video("inputs.encoder_hidden_states")
    inject = Injection({"cross": [(tap, Condition())]})
    assert golden.error(golden.run(x, text, "self", inject), "cross") <= TOLERANCE
    assert golden.error(golden.run(x, text, "self"), "cross") > 100 * TOLERANCE


@needs("videobooth_attention")
def test_temporal_attention_is_attention_over_one_group() -> None:
    golden = Golden("videobooth_attention", "temporal", "temporal")
    x = rearrange(golden.tensors["inputs.hidden_states"], "b n c -> b 1 n c")
    assert golden.error(golden.run(x, x, None), "temporal") <= TOLERANCE


def test_repeated_keys_change_nothing() -> None:
    """Why ``first+previous`` may drop the repeat of frame 0 that Tune-A-Video's frames 0 and 1 read twice."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 2, 8, generator=generator, dtype=torch.float64)
    twice = torch.softmax(
        torch.einsum("bfnkd,bmkd->bfknm", q, repeat(k[:, 0], "b m k d -> b (r m) k d", r=2)) * 8**-0.5, -1
    )
    expected = torch.einsum("bfknm,bmkd->bfnkd", twice, repeat(v[:, 0], "b m k d -> b (r m) k d", r=2))
    assert (attend(q, [Segment(k, v, FramePlan("first+previous").frames(2))]) - expected).abs().max() < 1e-12
