"""The discrete process against the tensors of the original code (VideoBooth's `diffusion` package)."""

from __future__ import annotations

import pytest
import torch
from files import has, load
from torch import Tensor

from dit_booth.diffusion import ObjectiveConfig, SamplerConfig, guide, make_objective, sample, samplers
from dit_booth.diffusion.objectives import DiscreteObjective
from dit_booth.diffusion.samplers import ddim_step, ddpm_step
from dit_booth.diffusion.schedule import DiscreteSchedule, linear_betas

torch.set_num_threads(1)
INFO, GOLDEN = load("diffusion")
SPACINGS = {"1000": "1000", "250": "250", "50": "50", "ddim50": "ddim50", "10_15_20": "10,15,20", "5": "5"}
STEPPED = ("1000", "250", "50")
TABLES = ("betas", "alphas_cumprod", "posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance")


def spaced(name: str) -> DiscreteSchedule:
    return DiscreteSchedule(linear_betas()).respace(SPACINGS[name])


def objective() -> DiscreteObjective:
    built = make_objective(ObjectiveConfig(kind="eps"))
    assert isinstance(built, DiscreteObjective)
    return built


def estimate(
    name: str, dtype: torch.dtype = torch.float32
) -> tuple[DiscreteSchedule, Tensor, Tensor, Tensor, Tensor]:
    """Schedule, steps, x, the estimate of x0 and the drawn noise of the one-step cases."""
    schedule, t = spaced(name), GOLDEN[f"inputs.{name}.t"]
    x, eps, noise = (GOLDEN[f"inputs.{key}"].to(dtype) for key in ("x", "eps", "noise"))
    return schedule, t, x, objective().to_x0(eps, x, schedule.timestep_map[t]), noise


def assert_equal(ours: Tensor, name: str, rtol: float = 2e-5) -> None:
    golden = GOLDEN[f"outputs.{name}"].double()
    torch.testing.assert_close(ours.double(), golden, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", SPACINGS)
def test_schedule_tables_equal_the_original_in_float64(name: str) -> None:
    schedule = spaced(name)
    assert len(schedule) == INFO["findings"][name]["n"]
    assert torch.equal(schedule.timestep_map, GOLDEN[f"outputs.{name}.timestep_map"])
    for table in TABLES:
        golden = GOLDEN[f"outputs.{name}.{table}"]
        torch.testing.assert_close(getattr(schedule, table), golden, rtol=1e-9, atol=1e-15, msg=table)
    log_variance = schedule.fixed_large_variance.log()
    torch.testing.assert_close(
        log_variance, GOLDEN[f"outputs.{name}.fixed_large_log_variance"], rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("name", STEPPED)
def test_noising_equals_the_original(name: str) -> None:
    t = spaced(name).timestep_map[GOLDEN[f"inputs.{name}.t"]]
    x0, eps = GOLDEN["inputs.x0"], GOLDEN["inputs.noise"]
    assert_equal(objective().noise(x0, t, eps), f"{name}.q_sample")
    assert_equal(spaced(name).q_sample(x0, GOLDEN[f"inputs.{name}.t"], eps), f"{name}.q_sample")
    reference, noise = GOLDEN["inputs.exemplar_latent_ori"], GOLDEN["inputs.exemplar_noise"]
    assert_equal(objective().noise(reference, t, noise), f"{name}.exemplar_latent")


@pytest.mark.parametrize("name", STEPPED)
def test_timestep_that_the_model_receives_equals_the_original(name: str) -> None:
    t = spaced(name).timestep_map[GOLDEN[f"inputs.{name}.t"]]
    received = objective().timestep(t)
    assert torch.equal(received, GOLDEN[f"outputs.{name}.model_ts"].float())
    assert torch.equal(objective().time(received), GOLDEN[f"outputs.{name}.exemplar_timestep"])


@pytest.mark.parametrize("name", STEPPED)
def test_loss_equals_the_original(name: str) -> None:
    t = spaced(name).timestep_map[GOLDEN[f"inputs.{name}.t"]]
    loss = objective().loss(GOLDEN["inputs.eps"], GOLDEN["inputs.x0"], GOLDEN["inputs.noise"], t)
    assert_equal(loss, f"{name}.training_loss")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", STEPPED)
def test_ddpm_step_equals_the_original(name: str, dtype: torch.dtype) -> None:
    schedule, t, x, x0, noise = estimate(name, dtype)
    assert_equal(x0, f"{name}.p_pred_xstart")
    assert_equal(ddpm_step(schedule, x0, x, t, None), f"{name}.p_mean")
    assert_equal(ddpm_step(schedule, x0, x, t, noise), f"{name}.p_sample")
    clipped = x0.clamp(-1, 1)
    assert_equal(clipped, f"{name}.p_pred_xstart_clip")
    assert_equal(ddpm_step(schedule, clipped, x, t, None), f"{name}.p_mean_clip")
    log_variance = schedule.at("fixed_large_variance", t, x).log().expand_as(x)
    assert_equal(log_variance, f"{name}.p_log_variance")


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("name", STEPPED)
def test_ddim_step_equals_the_original(name: str, eta: float) -> None:
    schedule, t, x, x0, noise = estimate(name)
    assert_equal(ddim_step(schedule, x0, x, t, eta, noise), f"{name}.ddim_eta{eta}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "output"), [("ddpm", "p_sample_loop"), ("ddim", "ddim_sample_loop")])
def test_five_step_loop_equals_the_original(
    kind: str, output: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = iter(GOLDEN["inputs.loop_noises"].to(dtype))
    monkeypatch.setattr(samplers, "randn_like", lambda x, generator: next(draws))

    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x + 0.1 * torch.sin(t.to(dtype)).reshape(-1, 1, 1, 1, 1)

    config = SamplerConfig(kind=kind, steps=5)  # type: ignore[arg-type]
    x = sample(model, objective(), config, GOLDEN["inputs.x"].to(dtype), torch.Generator())
    assert_equal(x, f"5.{output}")


@pytest.mark.skipif(not has("videobooth_unet_l1"), reason="needs the large golden files of ../shared/golden")
def test_guidance_equals_the_released_code_on_three_of_four_channels() -> None:
    _, unet = load("videobooth_unet_l1")
    cond, uncond = unet["outputs.e_cond"], unet["outputs.e_uncond"]  # b c f h w
    ours = guide(cond, uncond, float(unet["inputs.e_cfg_scale"]), channels=3, axis=1)
    assert torch.equal(ours, unet["outputs.e_cfg"][:1])
    everywhere = guide(cond, uncond, float(unet["inputs.e_cfg_scale"]), axis=1)
    assert torch.equal(everywhere[:, :3], ours[:, :3])
    assert (everywhere[:, 3] - ours[:, 3]).abs().max() > 1
