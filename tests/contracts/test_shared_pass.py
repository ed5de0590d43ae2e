"""One recording pass serves every strategy that needs its kind of noise: the same function as a pass for each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dit_booth.strategies.kv_concat import KVConcatConfig
from dit_booth.strategies.token_bank import TokenBankConfig
from torch import Tensor

from dit_booth.inject import Reference
from dit_booth.models.injected import Injected
from dit_booth.testing import Trial, trial, worst

F64 = torch.float64
OPTIONS = {
    "kv_concat": KVConcatConfig(reference_noise="clean"),
    "token_bank": TokenBankConfig(source="latent"),
}


def gradients(run: Trial, reference: Reference) -> tuple[Tensor, dict[str, Tensor]]:
    trained = run.train_in("fine")
    output = run.model(run.x.to(F64), run.t, run.prompt, reference).output
    found = torch.autograd.grad(output.square().mean(), list(trained.values()))
    return output.detach(), dict(zip(trained, found, strict=True))


@pytest.mark.parametrize("backbone", ["dit-factorised", "unet"])
def test_a_shared_pass_has_the_output_and_the_gradients_of_a_pass_for_each(
    backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trial("kv_concat+token_bank", backbone, options=OPTIONS).perturb()
    seen = run.reference()
    run.model.to(F64)
    assert seen.noisy is not None
    reference = replace(
        seen,
        states=tuple(state.to(F64) for state in seen.states),
        embedding=seen.embedding.to(F64),
        latent=seen.latent.to(F64),
        noisy=seen.noisy.to(F64),
    )
    passes: list[int] = []
    run.model.backbone.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
    shared, one = gradients(run, reference)
    assert passes == [1, run.x.shape[1]], "one pass of the reference, then the video"

    together = Injected.conditions

    def apart(model: Injected, t: Tensor, given: Reference, names: tuple[str, ...]) -> dict[str, object]:
        return {name: together(model, t, given, (name,))[name] for name in names}

    monkeypatch.setattr(Injected, "conditions", apart)
    passes.clear()
    each, two = gradients(run, reference)
    assert passes == [1, 1, run.x.shape[1]], "a pass for each strategy"
    assert torch.equal(shared, each)
    for name, gradient in one.items():
        assert worst(gradient, two[name]) <= 1e-12 * max(1.0, gradient.abs().max().item()), name
