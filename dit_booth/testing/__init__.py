"""What every strategy promises, as checks for its author: the built-in ones pass the same.

    from dit_booth.testing import check_strategy

    check_strategy("mine")                        # a registered name, a sum of names, or the class
    check_strategy("mine", backbones=["unet"])    # on one of `BACKBONES`

A failed promise is an AssertionError that says which one, on which backbone. The models are tiny, with every parameter
random, so that nothing hides behind a zero; all checks of a strategy take seconds. How a strategy behaves under
DeepSpeed is `check_under_zero`, called in every process of a launch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dit_booth.components import Components, build_backbone
from dit_booth.config import STAGES, DataConfig, RunConfig, StageName, TrainConfig
from dit_booth.config.parse import config_class
from dit_booth.diffusion.objectives import make_objective
from dit_booth.inject import Reference
from dit_booth.models.autoencoder.config import AutoencoderConfig
from dit_booth.models.autoencoder.model import build_autoencoder
from dit_booth.models.clip.config import ClipConfig
from dit_booth.models.clip.encoders import NULL_PROMPT, ImageEncoder, Prompt, TextEncoder, build_clip
from dit_booth.models.dit.model import DiTConfig, VideoDiT
from dit_booth.models.injected import Injected, Prediction, gather_sites
from dit_booth.models.layers import allow_einops_in_graph
from dit_booth.models.pretrained import load_strategy_weights, read_strategy_weights
from dit_booth.models.unet.model import UNetConfig, VideoUNet
from dit_booth.models.weights import load_strictly, part, read, write
from dit_booth.strategy import Strategy, StrategyConfig, create, find
from dit_booth.testing.template import Template
from dit_booth.training.stage import set_trainable, trainable_globs

FRAMES, SIZE = 3, 12
_DIT: dict[str, Any] = {"depth": 2, "hidden": 32, "heads": 2}
BACKBONES: dict[str, dict[str, Any]] = {
    "dit-factorised": {"dit": DiTConfig(**_DIT)},
    "dit-interleaved": {"dit": DiTConfig(**_DIT, layout="interleaved")},
    "dit-joint": {"dit": DiTConfig(**_DIT, layout="joint", plan="all")},
    "dit-cross_attention": {"dit": DiTConfig(**_DIT, conditioning="cross_attention")},
    "unet": {
        "backbone": "unet",
        "unet": UNetConfig(
            channels=(8, 16), norm_groups=4, heads=2, layers_per_block=1, down_attention=(True, True)
        ),
    },
}
"""Settings of the tiny backbones: every layout, with text attention and without."""


@dataclass
class Trial:
    """A tiny model with a strategy, and the arguments of one step: two videos with captions that name their subject."""

    components: Components
    x: Tensor
    t: Tensor
    prompt: Prompt

    @property
    def model(self) -> Injected:
        return self.components.model

    @property
    def classes(self) -> Mapping[str, type[Strategy]]:
        return find(self.components.config.strategy)

    @property
    def stages(self) -> list[StageName]:
        """The stages in which a strategy of the sum trains anything."""
        return [s for s in STAGES if any(s in self.model.strategy.part(n).stages() for n in self.classes)]

    def reference(self, seed: int = 0, batch: int = 2) -> Reference:
        """Random images; one seed, one reference."""
        generator = torch.Generator().manual_seed(100 + seed)
        images = torch.rand(batch, 3, SIZE, SIZE, generator=generator) * 2 - 1
        reference = self.components.reference(images, torch.float32)
        noise = torch.randn(reference.noisy.shape, generator=generator)
        return replace(reference, noisy=0.6 * reference.noisy + 0.8 * noise)

    def __call__(self, reference: Reference | None) -> Tensor:
        prediction: Prediction = self.model(self.x, self.t, self.prompt, reference)
        return prediction.output

    def plain(self) -> Tensor:
        """The backbone without any strategy."""
        output: Tensor = self.model.backbone(self.x, self.t, self.model.text(self.prompt))
        return output

    def row(self, i: int) -> tuple[Tensor, Tensor, Prompt, Reference]:
        """The arguments of the network for one of the videos."""
        rows, ours = slice(i, i + 1), self.reference()
        mine = replace(
            ours,
            image=ours.image[rows],
            states=tuple(s[rows] for s in ours.states),
            embedding=ours.embedding[rows],
            latent=ours.latent[rows],
            noisy=ours.noisy[rows],
        )
        return self.x[rows], self.t[rows], self.prompt.each(lambda y: y[rows]), mine

    def train_in(self, stage: StageName) -> dict[str, nn.Parameter]:
        """Make trainable what a stage trains, with all strategies active."""
        globs = trainable_globs(self.components.config, self.model, stage, tuple(self.classes))
        return set_trainable(self.model, globs)

    def wanted(self) -> list[Tensor]:
        """What to ask gradients of: the parameters of the last stage, or else x."""
        parameters: list[Tensor] = [p for stage in self.stages[-1:] for p in self.train_in(stage).values()]
        return parameters or [self.x.requires_grad_()]

    def perturb(self) -> Trial:
        """Move every parameter of the strategies a little: a zero-initialised layer would stop gradients."""
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in self.model.strategy.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
        return self


def trial(
    strategy: str,
    backbone: str = "dit-factorised",
    seed: int = 0,
    options: Mapping[str, StrategyConfig] | None = None,
    **settings: Any,
) -> Trial:
    """A strategy on one of `BACKBONES`; `settings` are fields of `RunConfig` that replace that backbone's."""
    text, image_encoder = _text().copy(), _clip()[1]
    config = config_class(strategy)(
        strategy=strategy,
        weights="none",
        clip=ClipConfig(pretrained="none"),
        autoencoder=AutoencoderConfig(patch=3),
        data=DataConfig(size=SIZE, frames=FRAMES),
        train=TrainConfig(seed=seed),
        **{**BACKBONES[backbone], **settings, **(options or {})},
    )
    autoencoder = build_autoencoder(config.autoencoder)
    body = _body(config.backbone, config.dit, config.unet, autoencoder.channels).copy()
    sites = gather_sites(
        body,
        text,
        image_dim=image_encoder.width,
        image_embed_dim=image_encoder.embed_dim,
        latent_channels=autoencoder.channels,
        frames=FRAMES,
    )
    torch.manual_seed(seed)
    model = Injected(
        body, text, create(find(strategy), config.options(), sites), text.tokenize([NULL_PROMPT])
    )
    components = Components(config, model, autoencoder, image_encoder, make_objective(config.objective))
    x = torch.randn(
        2, FRAMES, autoencoder.channels, SIZE // 3, SIZE // 3, generator=torch.Generator().manual_seed(9)
    )
    prompt = text.tokenize(["a dog runs", "the red cat and a cat"], ["dog", "cat"])
    return Trial(components, x, torch.tensor([40.0, 700.0]), prompt)


@cache
def _clip() -> tuple[TextEncoder, ImageEncoder]:
    torch.manual_seed(0)
    return build_clip(ClipConfig(pretrained="none"))


@cache
def _text() -> Template[TextEncoder]:
    return Template(_clip()[0])


@cache
def _body(
    kind: Literal["dit", "unet"], dit: DiTConfig, unet: UNetConfig, channels: int
) -> Template[VideoDiT | VideoUNet]:
    """A backbone with every parameter random, built once: trials copy it."""
    text, _ = _clip()
    config = RunConfig(backbone=kind, dit=dit, unet=unet)
    torch.manual_seed(0)
    body = build_backbone(config, channels, text.width, text.embed_dim)
    _fill_zeros(body)
    return Template(body)


@torch.no_grad()
def _fill_zeros(backbone: nn.Module) -> None:
    """Random numbers in the zero-initialised parameters: strategies shall meet a backbone as training leaves it."""
    generator = torch.Generator().manual_seed(5)
    for p in backbone.parameters():
        noise = torch.randn(p.shape, generator=generator)
        if not p.any():
            p.copy_(0.1 * noise)


def worst(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference."""
    return (a - b).abs().max().item()


# ---- the promises ------------------------------------------------------------------------------------------


def backbone_is_untouched(make: Callable[..., Trial]) -> None:
    """The backbone's and the text encoder's parameters keep their names and values, and no parameter has two owners."""
    run, control = make().model, make(strategy="none", options={}).model
    for name in ("backbone", "text"):
        ours, theirs = (r.get_submodule(name).state_dict() for r in (run, control))
        assert list(ours) == list(theirs), f"the {name}'s parameter names changed: {set(ours) ^ set(theirs)}"
        assert all(torch.equal(ours[k], theirs[k]) for k in ours), f"building the strategy changed the {name}"
    own = {id(p) for p in run.strategy.parameters()}
    shared = own & {id(p) for p in (*run.backbone.parameters(), *run.text.parameters())}
    assert not shared, "a parameter belongs to the strategy and to the backbone; use Site.copy_of"


@torch.no_grad()
def identity_is_as_declared(make: Callable[..., Trial]) -> None:
    """`identity_at_init`: before training, the output with an image is exactly the backbone's, or it is not."""
    run = make()
    plain, with_image = run.plain(), run(run.reference())
    assert plain.abs().max() > 1e-3
    if all(cls.identity_at_init for cls in run.classes.values()):
        assert torch.equal(with_image, plain), (
            f"identity_at_init, but the output moves by {worst(with_image, plain):.1e}"
        )
    else:
        assert worst(with_image, plain) > 1e-5, (
            "identity_at_init is false, but a new strategy changes nothing"
        )


@torch.no_grad()
def no_image_is_no_change(make: Callable[..., Trial]) -> None:
    """Without a reference a new strategy leaves the output as it is, and adds no auxiliary loss."""
    run = make()
    assert torch.equal(run(None), run.plain()), "a tap changes its payload though its Condition is empty"
    assert run.model(run.x, run.t, run.prompt, None).aux_loss == 0


def gradients_reach_what_is_trained(make: Callable[..., Trial]) -> None:
    """In each stage every trainable parameter gets a gradient, no other does, and some stage trains each parameter."""
    run, trained = make().perturb(), set()
    for stage in run.stages:
        chosen = run.train_in(stage)
        run.model.zero_grad(set_to_none=True)
        prediction = run.model(run.x, run.t, run.prompt, run.reference())
        (prediction.output.square().sum() + prediction.aux_loss).backward()
        for key, p in run.model.named_parameters():
            if key in chosen:
                assert p.grad is not None and p.grad.abs().max() > 1e-9, f"{stage}: no gradient at {key}"
            else:
                assert p.grad is None, f"{stage}: {key} is frozen, but has a gradient"
        trained |= {key for key in chosen if key.startswith("strategy.")}
    own = {f"strategy.{key}" for key, _ in run.model.strategy.named_parameters()}
    assert trained == own, f"no stage trains {', '.join(sorted(own - trained))}"


@torch.no_grad()
def saved_and_loaded_is_the_same(make: Callable[..., Trial]) -> None:
    """Saved and loaded into another run it computes the same; its file holds the strategy's own keys only."""
    run, other = make().perturb(), make(seed=1)
    expected = run(run.reference())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "strategy.safetensors"
        write(file, part(run.model.state_dict(), "strategy."), {"strategy": run.components.config.strategy})
        with safe_open(file, "pt") as saved:
            keys = set(saved.keys())
        names = tuple(run.classes)
        assert all(key.partition(".")[0] in names for key in keys), f"keys of no strategy: {sorted(keys)[:4]}"
        assert keys == set(run.model.strategy.state_dict())
        if keys:
            assert worst(other(other.reference()), expected) > 1e-6, "loading must be what makes them equal"
            load_strategy_weights(other.model.strategy, read_strategy_weights(str(file)), "saved")
            load_strictly(other.model.strategy, read(file), "saved")
    assert torch.equal(other(other.reference()), expected), "loaded, it computes something else"


@torch.no_grad()
def rows_are_independent(make: Callable[..., Trial]) -> None:
    """A video depends on its own row of the batch only."""
    run = make().perturb()
    together = run(run.reference())
    for i in range(2):
        alone = run.model(*run.row(i)).output
        difference = worst(alone, together[i : i + 1])
        assert difference < 1e-5 * max(1, together.abs().max().item()), (
            f"row {i} changes by {difference:.1e} alone"
        )


def image_matters_as_declared(make: Callable[..., Trial]) -> None:
    """`reads_image`: after one training step another image gives another output, or no image ever does."""
    run = make()
    if stages := run.stages:
        optimizer = torch.optim.AdamW(run.train_in(stages[0]).values(), lr=1e-2)
        target = torch.randn(run.x.shape, generator=torch.Generator().manual_seed(4))
        (run(run.reference(1)) - target).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        difference = worst(run(run.reference(1)), run(run.reference(2)))
    if any(cls.reads_image for cls in run.classes.values()):
        assert difference > 1e-4, f"another image moves the output by {difference:.1e} only"
    else:
        assert difference == 0, "reads_image is false, but the image matters"


@torch.no_grad()
def time_matters_as_declared(make: Callable[..., Trial]) -> None:
    """A strategy that does not `depends_on_time` makes equal conditions at every timestep and noise."""
    run = make().perturb()
    reference, noise = run.reference(), run.reference(7).noisy
    names = [name for name in run.classes if not run.model.strategy.part(name).depends_on_time]
    made = [
        run.model.conditions(t, replace(reference, noisy=noisy), names)
        for t, noisy in ((run.t, reference.noisy), (run.t + 200, noise))
    ]
    for name in names:
        pairs = zip(*(_tensors(conditions[name]) for conditions in made), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), f"{name} depends on the time; set depends_on_time"


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, tuple):
        return [t for v in value for t in _tensors(v)]
    return _tensors(vars(value)) if hasattr(value, "__dict__") else []


def checkpointing_gives_equal_gradients(make: Callable[..., Trial]) -> None:
    """Recomputing activations in the backward pass changes no gradient."""
    gradients, plain_run = [], make()
    kind = plain_run.components.config.backbone
    settings = replace(getattr(plain_run.components.config, kind), checkpointing=True)
    for run in (plain_run, make(**{kind: settings})):
        wanted = run.perturb().wanted()
        prediction = run.model(run.x, run.t, run.prompt, run.reference())
        loss = prediction.output.square().mean() + prediction.aux_loss
        gradients.append(torch.autograd.grad(loss, wanted, allow_unused=True))
    for plain, recomputed in zip(*gradients, strict=True):
        assert worst(plain, recomputed) <= 1e-5 * plain.abs().max().item() + 1e-9, (
            "recomputed gradients differ"
        )


def compiled_is_the_same(make: Callable[..., Trial], backend: str = "eager") -> None:
    """torch.compile changes neither output nor gradients: a DiT's blocks, without a graph break; a U-Net's middle."""
    run = make().perturb()
    wanted, results = run.wanted(), []
    for compiled in (False, True):
        if compiled:
            torch.compiler.reset()
            allow_einops_in_graph()
            backbone = run.model.backbone
            part = (
                backbone.compile_blocks
                if isinstance(backbone, VideoDiT)
                else backbone.get_submodule("mid_block").compile
            )
            part(backend=backend, dynamic=False)
        prediction = run.model(run.x, run.t, run.prompt, run.reference())
        loss = prediction.output.square().mean() + prediction.aux_loss
        results.append((prediction.output.detach(), torch.autograd.grad(loss, wanted)))
    (plain, plain_grads), (output, grads) = results
    assert worst(plain, output) <= 1e-5 * plain.abs().max().item(), (
        "the compiled model computes something else"
    )
    for a, b in zip(plain_grads, grads, strict=True):
        assert worst(a, b) <= 1e-4 * a.abs().max().item() + 1e-9, "the compiled model has other gradients"


PROMISES: tuple[Callable[[Callable[..., Trial]], None], ...] = (
    backbone_is_untouched,
    identity_is_as_declared,
    no_image_is_no_change,
    gradients_reach_what_is_trained,
    saved_and_loaded_is_the_same,
    rows_are_independent,
    image_matters_as_declared,
    time_matters_as_declared,
    checkpointing_gives_equal_gradients,
    compiled_is_the_same,
)


def check_strategy(
    strategy: str | type[Strategy],
    *,
    backbones: Sequence[str] = tuple(BACKBONES),
    options: Mapping[str, StrategyConfig] | StrategyConfig | None = None,
    promises: Sequence[Callable[[Callable[..., Trial]], None]] = PROMISES,
) -> None:
    """Check a registered strategy, or a sum of them, on tiny backbones; AssertionError: it breaks a promise.

    options: of the strategy, or by name for those of a sum.
    """
    name = strategy if isinstance(strategy, str) else strategy.name
    named = {name: options} if isinstance(options, StrategyConfig) else dict(options or {})
    for backbone in backbones:

        def make(strategy: str = name, options: Mapping[str, StrategyConfig] = named, **more: Any) -> Trial:
            return trial(strategy, backbone, options=options, **more)  # noqa: B023 (used within the iteration)

        for promise in promises:
            try:
                promise(make)
            except AssertionError as error:
                raise AssertionError(f"{name} on {backbone}: {promise.__name__}: {error}") from error
