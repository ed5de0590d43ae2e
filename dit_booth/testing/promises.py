"""The promises of a strategy, as checks: each takes a function that makes a `Trial`, and raises AssertionError."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dit_booth.models.layers import CompiledByBlock, allow_einops_in_graph
from dit_booth.models.pretrained import load_strategy_weights, read_strategy_weights
from dit_booth.models.weights import load_strictly, part, read, write
from dit_booth.strategy import Strategy, StrategyConfig
from dit_booth.testing.tiny import BACKBONES, Trial, trial, worst


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
    assert torch.equal(run(None), run.plain()), "a tap changes its payload though it got no image"
    assert run.predict(None).aux_loss == 0


def gradients_reach_what_is_trained(make: Callable[..., Trial]) -> None:
    """In each stage every trainable parameter gets a gradient, no other does, and some stage trains each parameter."""
    run, trained = make().perturb(), set()
    for stage in run.stages:
        chosen = run.train_in(stage)
        run.model.zero_grad(set_to_none=True)
        prediction = run.predict(run.reference())
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
    """`reads_image`, `reads_all_images`: after a training step, other images change the output, or none ever do."""
    run = make(image_prompts=2)
    if trained := {p for stage in run.stages for p in run.train_in(stage).values()}:
        optimizer = torch.optim.AdamW([p.requires_grad_() for p in trained], lr=1e-2)
        target = torch.randn(run.x.shape, generator=torch.Generator().manual_seed(4))
        (run(run.reference(1)) - target).square().mean().backward()
        optimizer.step()
    one, other = run.reference(1), run.reference(2)
    with torch.no_grad():
        plain, moved, second = run(one), run(other), run(replace(one, further=other.further))
    difference, by_second = worst(plain, moved), worst(plain, second)
    if any(cls.reads_image for cls in run.classes.values()):
        assert difference > 1e-4, f"another image moves the output by {difference:.1e} only"
    else:
        assert difference == 0, "reads_image is false, but the image matters"
    if any(run.model.strategy.part(name).reads_all_images for name in run.classes):
        assert by_second > 1e-5, f"another second image moves the output by {by_second:.1e} only"
    else:
        assert by_second == 0, "reads_all_images is false, but the second image matters"


@torch.no_grad()
def condition_is_a_pure_function(make: Callable[..., Trial]) -> None:
    """The condition depends on the reference and on what `needs` names alone, and is the same in a second call."""
    run = make().perturb()
    names, reference = tuple(run.classes), run.reference()
    first = run.model.conditions(run.t, reference, names)
    for t in (run.t, run.t + 200):
        again = run.model.conditions(t, reference, names)
        for name, needs in run.model.strategy.needs.items():
            if needs.constant or t is run.t:
                pairs = zip(_tensors(first[name]), _tensors(again[name]), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs), f"{name}'s condition changes between calls"


def _tensors(value: object) -> list[Tensor]:
    """Return the tensors in a condition, in order, whatever it is made of."""
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
        prediction = run.predict(run.reference())
        loss = prediction.output.square().mean() + prediction.aux_loss
        gradients.append(torch.autograd.grad(loss, wanted, allow_unused=True))
    for plain, recomputed in zip(*gradients, strict=True):
        assert worst(plain, recomputed) <= 1e-5 * plain.abs().max().item() + 1e-9, (
            "recomputed gradients differ"
        )


def compiled_is_the_same(make: Callable[..., Trial], backend: str = "eager") -> None:
    """torch.compile keeps outputs and gradients: a transformer's blocks, without a graph break; a U-Net's middle."""
    run = make().perturb()
    wanted, results = run.wanted(), []
    for compiled in (False, True):
        if compiled:
            torch.compiler.reset()
            allow_einops_in_graph()
            backbone = run.model.backbone
            part = (
                backbone.compile_blocks
                if isinstance(backbone, CompiledByBlock)
                else backbone.get_submodule("mid_block").compile
            )
            part(backend=backend, dynamic=False)
        prediction = run.predict(run.reference())
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
    condition_is_a_pure_function,
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
    """Check a registered strategy, or a combination, on tiny backbones. AssertionError: it breaks a promise.

    options: of the strategy, or by name for a combination.
    """
    name = strategy if isinstance(strategy, str) else strategy.name
    named = {name: options} if isinstance(options, StrategyConfig) else dict(options or {})
    for backbone in backbones:
        make = partial(trial, strategy=name, backbone=backbone, options=named)
        for promise in promises:
            try:
                promise(make)
            except AssertionError as error:
                raise AssertionError(f"{name} on {backbone}: {promise.__name__}: {error}") from error
