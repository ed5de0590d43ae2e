"""Files of other systems in golden format, of any size; outputs computed naively in float64, as in make_files."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from make_files import File, Random
from torch import Tensor

# ---- DDIM inversion ------------------------------------------------------------------------------------------------


def ddim_inversion_file(
    *,
    channels: int = 3,
    frames: int = 2,
    size: tuple[int, int] = (4, 3),
    batch: int = 1,
    tokens: int = 4,
    text_dim: int = 6,
    steps: Sequence[int] = (4, 20),
    seed: int = 0,
) -> File:
    """A ``ddim_inversion`` file; gradient and Adam's update of the null text are written out."""
    random, tensors = Random(seed), dict[str, Tensor]()
    tensors["inputs.x0_latent"] = random.normal(batch, channels, frames, *size)
    for name in ("emb_uncond", "emb_source"):
        tensors[f"inputs.{name}"] = random.normal(batch, tokens, text_dim)
    for name, shape in {"A": (channels, channels), "Tm": (frames, frames), "M": (channels, text_dim)}.items():
        tensors[f"weights.{name}"] = 0.3 * random.normal(*shape)
    tensors["weights.b"] = 0.3 * random.normal(channels)
    config = {
        "tav_guidance": 5.0,
        "p2p_guidance": 3.5,
        "p2p_steps": 7,
        "p2p_inner_steps": 6,
        "p2p_epsilon": 1e-6,
        "p2p_large_epsilon": 0.05,
    }
    naive = NaiveInversion({k.split(".")[1]: x.double() for k, x in tensors.items()})
    tensors["outputs.alphas_cumprod"] = torch.tensor(naive.abar, dtype=torch.float64)
    for n in steps:
        for tag in ("off1", "off0", "off0_one"):
            for name, x in naive.tune_a_video(tag, n, config["tav_guidance"]).items():
                tensors[f"outputs.tav_{tag}_n{n}_{name}"] = x
    for prefix, epsilon in (("", "p2p_epsilon"), ("large_epsilon_", "p2p_large_epsilon")):
        found = naive.null_text(config, config[epsilon])
        tensors[f"outputs.p2p_{prefix}null_embeddings"], tensors[f"outputs.p2p_{prefix}inner_steps_used"] = (
            found
        )
    return {"source": "made by the tests", "config": config}, tensors


class NaiveInversion:
    """One step at a time, from the definitions."""

    def __init__(self, given: dict[str, Tensor]) -> None:
        self.given, self.abar = given, list[float]()
        product = 1.0
        for k in range(1000):
            product *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * k / 999) ** 2
            self.abar.append(product)

    def eps(self, x: Tensor, t: int, text: Tensor) -> Tensor:
        g = self.given
        out = (x.movedim(1, -1) @ g["A"].T).movedim(-1, 1) + (x.movedim(2, -1) @ g["Tm"].T).movedim(-1, 2)
        constant = t / 1000 * g["b"] + torch.stack([g["M"] @ words for words in text.mean(1)])
        return out + constant.reshape(*constant.shape, 1, 1, 1)

    def timesteps(self, n: int, offset: int) -> list[int]:
        return [i * (1000 // n) + offset for i in range(n)]

    def level(self, t: int, to_one: bool) -> float:
        return self.abar[t] if t >= 0 else 1.0 if to_one else self.abar[0]

    def move(self, x: Tensor, eps: Tensor, here: float, there: float) -> Tensor:
        clean = (x - math.sqrt(1 - here) * eps) / math.sqrt(here)
        return math.sqrt(there) * clean + math.sqrt(1 - there) * eps

    def inverted(self, n: int, offset: int, to_one: bool, text: Tensor) -> list[Tensor]:
        states = [self.given["x0_latent"]]
        for t in self.timesteps(n, offset):
            here, there = self.level(t - 1000 // n, to_one), self.level(t, to_one)
            states.append(self.move(states[-1], self.eps(states[-1], t, text), here, there))
        return states

    def sampled(
        self, n: int, offset: int, to_one: bool, x: Tensor, cond: Tensor, uncond: Tensor, w: float
    ) -> list[Tensor]:
        states = [x]
        for t in reversed(self.timesteps(n, offset)):
            u, c = self.eps(states[-1], t, uncond), self.eps(states[-1], t, cond)
            here, there = self.level(t, to_one), self.level(t - 1000 // n, to_one)
            states.append(self.move(states[-1], (1 - w) * u + w * c, here, there))
        return states

    def tune_a_video(self, tag: str, n: int, scale: float) -> dict[str, Tensor]:
        offset, to_one = int(tag[3]), tag.endswith("one")
        source, empty = self.given["emb_source"], self.given["emb_uncond"]
        text = empty if tag == "off0" else source
        inverted = self.inverted(n, offset, to_one, text)
        plain = self.sampled(n, offset, to_one, inverted[-1], text, text, 1.0)
        return {
            "timesteps": torch.tensor(self.timesteps(n, offset)[::-1]),
            "inverted_all": torch.stack(inverted),
            "sampled_all": torch.stack(plain),
            "sampled_guided": self.sampled(n, offset, to_one, inverted[-1], source, empty, scale)[-1],
        }

    def null_text(self, config: dict[str, float], epsilon: float) -> tuple[Tensor, Tensor]:
        n, w = int(config["p2p_steps"]), config["p2p_guidance"]
        states = self.inverted(n, 0, False, self.given["emb_source"])
        x, null, found, used = states[-1], self.given["emb_uncond"], [], []
        for i, t in enumerate(reversed(self.timesteps(n, 0))):
            here, there = self.level(t, False), self.level(t - 1000 // n, False)
            of_eps = math.sqrt(1 - there) - math.sqrt(there) * math.sqrt(1 - here) / math.sqrt(here)
            rate = 1e-2 * (1 - i / 100)
            first, second = torch.zeros_like(null), torch.zeros_like(null)

            def step(
                null: Tensor, x: Tensor = x, t: int = t, here: float = here, there: float = there
            ) -> Tensor:
                eps = (1 - w) * self.eps(x, t, null) + w * self.eps(x, t, self.given["emb_source"])
                return self.move(x, eps, here, there)

            for k in range(1, int(config["p2p_inner_steps"]) + 1):
                error = step(null) - states[n - 1 - i]
                by_channel = (2 * error / error.numel() * of_eps * (1 - w)).sum((2, 3, 4))  # b d
                gradient = (by_channel @ self.given["M"])[:, None].expand_as(null) / null.shape[1]
                first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
                null = null - rate * first / (1 - 0.9**k) / ((second / (1 - 0.999**k)).sqrt() + 1e-8)
                if error.square().mean() < epsilon + i * 2e-5:
                    break
            used.append(k)
            found.append(null)
            x = step(null)
        return torch.cat(found), torch.tensor(used)
