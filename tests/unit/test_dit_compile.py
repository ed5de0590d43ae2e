"""torch.compile of the blocks: no graph break, and one code for all blocks, with and without a strategy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from spies import worst
from torch import Tensor

from dit_booth.inject import Condition, Injection, Recorder, Sites, no_injection
from dit_booth.models.clip.encoders import Text
from dit_booth.models.dit.model import DiTConfig, VideoDiT
from dit_booth.strategy import create, find

torch.set_num_threads(1)
SHAPE: dict[str, Any] = {"depth": 3, "hidden": 24, "heads": 2}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """Graphs compiled since the last call; none may be cut."""
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert not counters["recompile_limit"] and not counters["frames"]["recompile_limit"]
    count: int = counters["stats"]["unique_graphs"]
    counters.clear()
    return count


def build(config: DiTConfig) -> VideoDiT:
    torch.manual_seed(0)
    dit = VideoDiT(config, channels=3, text_dim=8, text_embed_dim=6)
    for parameter in dit.parameters():
        parameter.data.normal_(std=0.1)
    return dit


def step(dit: VideoDiT, inject: Injection = no_injection, frames: int = 3) -> tuple[Tensor, Tensor]:
    """The output and the gradients of one training step."""
    generator = torch.Generator().manual_seed(1)
    x, tokens, pooled = (
        torch.randn(*s, generator=generator) for s in ((2, frames, 3, 4, 6), (2, 5, 8), (2, 6))
    )
    dit.zero_grad()
    out = dit(x, torch.tensor([40.0, 700.0]), Text(tokens, pooled), inject)
    out.square().mean().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in dit.parameters() if p.grad is not None])


def compiled(dit: VideoDiT, backend: str) -> VideoDiT:
    """Graphs are captured (`aot_eager`: and differentiated) as always, and run eagerly: no C++ compiler."""
    dit.compile_blocks(backend=backend)
    return dit


@pytest.mark.slow
def test_blocks_share_one_graph_with_and_without_a_strategy() -> None:
    dit = build(DiTConfig(**SHAPE))
    sites = Sites(tuple(dit.sites()), 8, 8, 3, 3)
    strategies = create(find("kv_concat"), {}, sites)
    part: Any = strategies.part("kv_concat")
    names = list(part.readers)
    hidden = {name: torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(2)) for name in names}

    def with_image() -> Injection:
        kv = {name: reader.project(hidden[name]) for name, reader in part.readers.items()}
        return strategies.bind(["kv_concat"], {"kv_concat": Condition(at=kv)})

    plain, image = step(dit), step(dit, with_image())
    assert worst(plain[0], image[0]) > 1e-4
    compiled(dit, "eager")
    assert list(dict(dit.named_parameters())) == list(dict(build(DiTConfig(**SHAPE)).named_parameters()))
    for inject, expected in ((lambda: no_injection, plain), (with_image, image)):
        for count in (1, 0):
            got = step(dit, inject())
            assert graphs() == count, "the second step compiles nothing"
        assert all(worst(a, b) < 1e-5 for a, b in zip(got, expected, strict=True))
    recorder = Recorder(strategies.bind(["kv_concat"]), names)
    step(dit, recorder, frames=1)
    assert graphs() == 1
    assert set(recorder.hidden) == set(names) and all(h.shape == (2, 6, 24) for h in recorder.hidden.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "count", "backend"),
    [
        ({"layout": "interleaved", "conditioning": "in_context"}, 2, "eager"),  # blocks of two kinds
        (
            {
                "positions": "rotary",
                "qk_norm": True,
                "mlp": "swiglu",
                "conv": True,
                "conditioning": "cross_attention",
            },
            1,
            "aot_eager",
        ),
        ({"checkpointing": True}, 1, "aot_eager"),
    ],
    ids=["interleaved", "rotary", "checkpointing"],
)
def test_options_compile_without_a_break(options: dict[str, Any], count: int, backend: str) -> None:
    config = DiTConfig(**SHAPE, **options)
    dit = build(config)
    expected = step(dit)
    got = step(compiled(dit, backend))
    assert graphs() == count
    assert all(worst(a, b) < 1e-5 for a, b in zip(got, expected, strict=True))
