"""Memory of training on one GPU of several: weights, gradients and optimizer under ZeRO, activations by a dry run.

Parameters and gradients are bfloat16, the master weights and AdamW's two moments float32, the averaged weights float32
(`train.ema`), as DeepSpeed keeps them: 2 bytes for each parameter, and 2 + 12 + 4 for each trained one (ZeRO, arXiv
1910.02054, section 3). Stage 1 divides the 12 among the ranks, stage 2 also the gradients, stage 3 everything.
Activations are the peak of what lives in one step on one video, run on the meta device: nothing is computed.

umT5 counts where a strategy changes words, which encodes captions in every step; its activations do not. Left out are
other encoders (encoded data need none: `data.cache`), communication buffers, the CUDA context, and what the allocator
loses; `SPARE` stands for them.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product, starmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_booth.config import RunConfig, StageName
from dit_booth.cost.describe import VIT_L_14, Device, Encoders, Latents, build, inputs, reference
from dit_booth.models.injected import Injected
from dit_booth.training.stage import (
    active_strategies,
    schedule_of,
    set_trainable,
    stage_config,
    trainable_globs,
)

GIB = 2**30
CARDS = (24, 48, 80)
"""GPU memory in GiB, as sold."""
SPARE = 0.1
"""Share of a card that is left for what is not counted."""
RANKS = (1, 2, 4, 8)
UMT5_BYTES = 2 * 5_680_910_336
"""umT5-XXL's encoder in bfloat16."""
DEPTHS = (4, 5)
"""Blocks of the networks that run dry: from the fourth one on, memory grows by the same amount with every block."""


class LiveBytes(TorchDispatchMode):
    """Follow the bytes of all tensors made while it is entered, on any device: `live` now, `peak` at most.

    What was there before counts as nothing. Memory inside an operation (a kernel's workspace) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = kwargs or {}
        for x in tree_leaves((args, given)):
            if isinstance(x, Tensor):
                self.add(x, 0)
        out: object = func(*args, **given)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.add(x, x.untyped_storage().nbytes())
        return out

    def add(self, x: Tensor, size: int) -> None:
        """Count a tensor's storage until it is freed, if it is a new one."""
        storage = x.untyped_storage()
        key = id(storage)
        if key in self.known:
            return
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed(_: object) -> None:
            self.live -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, freed)


@dataclass(frozen=True)
class Way:
    """A way to train: recomputing activations or not, at a ZeRO stage. `WAYS`: less work first, then less traffic."""

    checkpointing: bool
    zero: int

    def __str__(self) -> str:
        return f"ZeRO {self.zero}{' + recompute' * self.checkpointing}"


WAYS = tuple(starmap(Way, product((False, True), (1, 2, 3))))


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Sizes of a stage's training: parameters, trained ones, and bytes of activations of one video."""

    name: StageName
    parameters: int
    trained: int
    activations: int
    recomputed: int  # bytes of activations with checkpointing
    text: int = 0  # bytes of a text encoder that runs in every step, whole on each rank

    def rank(self, ranks: int, way: Way, *, ema: bool) -> float:
        """Return the bytes on one of `ranks` GPUs."""
        split = [1.0 / ranks if way.zero >= stage else 1.0 for stage in (1, 2, 3)]
        weights, averaged = 2 * self.parameters * split[2], 4.0 * ema * self.trained * split[2]
        states = self.trained * (12 * split[0] + 2 * split[1])
        activations = self.recomputed if way.checkpointing else self.activations
        return weights + averaged + states + self.text + activations


def table_of_memory(config: RunConfig, latents: Latents) -> list[str]:
    """Return lines for each stage of the run: activations, GiB per GPU, and what fits on `CARDS`."""
    ema = config.train.ema > 0
    lines = []
    for index, name in enumerate(schedule_of(config)):
        stage = measure(config, latents, index)
        lines += [
            "",
            f"training of {name}, one video on each GPU: {stage.trained / 1e6:.1f} M of {stage.parameters / 1e6:.1f} M"
            f" parameters, {stage.activations / GIB:.2f} GiB of activations, {stage.recomputed / GIB:.2f} recomputed"
            f" (checkpointing){f', {stage.text / GIB:.1f} of umT5' if stage.text else ''}",
            "GPUs" + "".join(f"{way!s:>20}" for way in WAYS) + "   [GiB on each]",
        ]
        for ranks in RANKS:
            sizes = (stage.rank(ranks, way, ema=ema) / GIB for way in WAYS)
            lines.append(f"{ranks:4}" + "".join(f"{size:20.1f}" for size in sizes))
        lines += [f"{card} GiB cards: {fitting(stage, card, ema=ema)}" for card in CARDS]
    return lines


def fitting(stage: StageMemory, card: int, *, ema: bool) -> str:
    """Return the first of `WAYS` that fits on cards of `card` GiB, for each number of them."""
    room = card * (1 - SPARE) * GIB
    found = (next((w for w in WAYS if stage.rank(n, w, ema=ema) <= room), "does not fit") for n in RANKS)
    return "; ".join(f"{n}: {way}" for n, way in zip(RANKS, found, strict=True))


# ---- the dry run -------------------------------------------------------------------------------------------


def measure(config: RunConfig, latents: Latents, index: int) -> StageMemory:
    """Return the sizes of the run's stage of this index. Its activations come from networks of `DEPTHS` blocks."""
    name, encoders = schedule_of(config)[index], VIT_L_14.reading(config.text)
    whole = build(config, latents, encoders=encoders)
    trained = train_in(config, whole, index)
    blocks = 0 if config.backbone == "unet" else len(list(whole.backbone.get_submodule("blocks").children()))
    both = [activations(config, latents, index, encoders, blocks, again) for again in (False, True)]
    return StageMemory(
        name=name,
        parameters=sum(p.numel() for p in whole.parameters()),
        trained=sum(p.numel() for p in trained),
        activations=both[0],
        recomputed=both[1],
        text=UMT5_BYTES if config.text.kind == "umt5" and changes_words(whole) else 0,
    )


def changes_words(model: Injected) -> bool:
    """Return True if an active strategy acts before the text encoder."""
    words = {site.name for site in model.text.sites()}
    return any(words & model.strategy.part(name).attached.keys() for name in model.active)


def train_in(config: RunConfig, model: Injected, index: int) -> list[nn.Parameter]:
    """Set the parameters that a stage trains; return them."""
    schedule = schedule_of(config)
    model.active = active_strategies(config, schedule, index)
    globs = trainable_globs(config, model, schedule[index], model.active)
    return list(set_trainable(model, globs, model.active).values())


def shallow(config: RunConfig, depth: int, checkpointing: bool) -> RunConfig:
    """Return a copy whose network has `depth` blocks; a U-Net keeps its own."""
    network: Any = replace(config.network, checkpointing=checkpointing)
    if config.backbone != "unet":
        network = replace(network, depth=depth)
    return replace(config, **{config.backbone: network})


def activations(
    config: RunConfig, latents: Latents, index: int, encoders: Encoders, blocks: int, checkpointing: bool
) -> int:
    """Return the bytes of a network of `blocks` blocks, extrapolated from those of `DEPTHS`; 0: of a U-Net."""
    low, high = DEPTHS
    first = step_bytes(shallow(config, low, checkpointing), latents, index, encoders)
    if not blocks:
        return first
    second = step_bytes(shallow(config, high, checkpointing), latents, index, encoders)
    return first + (second - first) * (blocks - low) // (high - low)


def step_bytes(
    config: RunConfig, latents: Latents, index: int, encoders: Encoders, device: Device = "meta"
) -> int:
    """Return the peak of a step's tensors, forward and backward, on one video; gradients leave as they are made."""
    name = schedule_of(config)[index]
    model = build(config, latents, device, encoders).bfloat16()
    for parameter in train_in(config, model, index):
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    frames = config.autoencoder.latent_frames(stage_config(config, name).frames_of(config.data.frames))
    shape = (1, frames, *latents)
    options: Any = {"device": device, "dtype": torch.bfloat16, "encoders": encoders}
    copies = model.strategy.reference_frames(model.active)
    image = reference(shape, copies=copies, image_dim=config.image_states_width, **options)
    given = inputs(shape, **options)
    counter = LiveBytes()
    with counter:
        prediction = model(*given, image)
        (prediction.output.float().square().mean() + prediction.aux_loss).backward()
    return counter.peak
