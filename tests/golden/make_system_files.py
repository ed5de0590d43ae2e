"""Files of other systems in golden format, of any size; outputs computed naively in float64, as in make_files."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from attention_cases import Original
from dense import mapper as dense_mapper
from dense import softmax_attention
from make_files import File, Random, attention_file
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


# ---- ELITE ---------------------------------------------------------------------------------------------------------


def elite_file(
    *,
    image_dim: int = 10,
    width: int = 7,
    text_dim: int = 6,
    dim: int = 12,
    heads: int = 3,
    grid: int = 3,
    batch: int = 3,
    queries: int = 5,
    text_tokens: int = 4,
    seed: int = 0,
) -> File:
    """An ``elite`` file; attention is computed query by query, head by head."""
    random, tensors = Random(seed), dict[str, Tensor]()
    for mapper in ("mapper_global", "mapper_local"):
        for name in [f"{part}_{j}" for j in range(5) for part in ("mapping", "mapping_patch")]:
            shapes = {"0": (width, image_dim), "3": (width, width), "6": (text_dim, width)}
            for layer, shape in shapes.items():
                tensors[f"weights.{mapper}.{name}.{layer}.weight"] = random.normal(*shape) / shape[1] ** 0.5
                tensors[f"weights.{mapper}.{name}.{layer}.bias"] = random.normal(shape[0])
            for norm in ("1", "4"):
                tensors[f"weights.{mapper}.{name}.{norm}.weight"] = 1 + 0.1 * random.normal(width)
                tensors[f"weights.{mapper}.{name}.{norm}.bias"] = random.normal(width)
    for name, source in {"attn1": dim, "attn2": text_dim}.items():
        for projection in ("to_q", "to_out.0"):
            tensors[f"weights.{name}.{projection}.weight"] = random.normal(dim, dim) / dim**0.5
        tensors[f"weights.{name}.to_out.0.bias"] = random.normal(dim)
        for suffix in ("", "_global", "_local") if name == "attn2" else ("",):
            for p in ("to_k", "to_v"):
                tensors[f"weights.{name}.{p}{suffix}.weight"] = random.normal(dim, source) / source**0.5
    for j in range(5):
        tensors[f"inputs.embs_{j}"] = random.normal(batch, 1 + grid * grid, image_dim)
    seg = (random.normal(batch, 1, 8 * grid, 8 * grid) > 0).float().expand(-1, 3, -1, -1)
    tensors["inputs.pixel_values_seg"] = seg
    tensors["inputs.hidden_states"] = random.normal(batch, queries, dim)
    for name in ("context_tensor", "context_uncond"):
        tensors[f"inputs.{name}"] = random.normal(batch, text_tokens, text_dim)
    tensors["inputs.local_index"] = torch.randint(text_tokens, (batch,), generator=random.generator)
    for name in ("noise_pred", "noise"):
        tensors[f"inputs.{name}"] = random.normal(batch, 4, 3, 5)
    tensors["inputs.mask_values"] = (random.normal(batch, 1, 3, 5) > -0.3).float()
    tensors["inputs.value_local_second_layer"] = random.normal(2, 3, 4)
    info = {"source": "made by the tests", "config": {"heads": heads, "LAMBDA": 0.35}}
    tensors |= {f"outputs.{k}": x for k, x in elite_outputs(tensors, heads, 0.35).items()}
    return info, tensors


def elite_outputs(tensors: dict[str, Tensor], heads: int, scale: float) -> dict[str, Tensor]:
    given = {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
    states = [given[f"inputs.embs_{j}"] for j in range(5)]
    words, patches = naive_mappers(given, states)
    side = math.isqrt(patches.shape[1])
    step = given["inputs.pixel_values_seg"].shape[-1] // side
    mask = given["inputs.pixel_values_seg"][:, 0, ::step, ::step].reshape(len(words), -1, 1)
    run = NaiveElite(given, heads)
    local, text, empty = patches * mask, given["inputs.context_tensor"], given["inputs.context_uncond"]
    values = local @ given["weights.attn2.to_v_local.weight"].T
    size = values.shape[-1] // heads
    by_head = [values[b, :, k * size : (k + 1) * size] for b in range(len(values)) for k in range(heads)]
    error = (given["inputs.noise_pred"] - given["inputs.noise"]) ** 2
    region = given["inputs.mask_values"]
    of_rows = [(error[b] * region[b]).sum() / region[b].sum() for b in range(len(error))]
    mean_values = [torch.stack(by_head).abs().mean(), given["inputs.value_local_second_layer"].abs().mean()]
    local_mle, local_reg = sum(of_rows) / len(of_rows), 1e-4 * sum(mean_values) / 2
    global_mle, global_reg = error.mean(), 0.01 * words.abs().mean()
    alone = [run.text(text, local, scale, [b]) for b in range(len(words))]
    return {
        "global_mapper_five_tokens": words,
        "local_mapper_unmasked": patches,
        "mask": mask,
        "local_masked": local,
        "attn1_self": naive_self_attention(given, heads),
        "attn2_a_global_only": run.text(text),
        "attn2_a_uncond": run.text(empty),
        "attn2_b_local_no_lambda": run.text(text, local, 1.0),
        "attn2_c_local_lambda": run.text(text, local, scale),
        "attn2_d_local_all_masked": run.text(text, 0 * local, scale),
        "attn2_e_local_unmasked": run.text(text, patches, scale),
        "attn2_f_each_sample_alone": torch.cat(alone),
        "value_local": torch.stack(by_head),
        "local_loss_mle": local_mle,
        "local_loss_reg": local_reg,
        "local_loss": local_mle + local_reg,
        "global_loss_mle": global_mle,
        "global_loss_reg": global_reg,
        "global_loss": global_mle + global_reg,
    }


def naive_mappers(given: dict[str, Tensor], states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Words (b 5 d) of the one, patch features (b n d) of the other: each patch is mapped as a mean over itself."""

    def weights(mapper: str) -> dict[str, Tensor]:
        start = f"weights.{mapper}."
        return {k.removeprefix(start): x for k, x in given.items() if k.startswith(start)}

    count = states[0].shape[1] - 1
    one_patch = [[state[:, [0, 1 + i]] for state in states] for i in range(count)]
    mapped = [dense_mapper(weights("mapper_local"), pair).mean(1) for pair in one_patch]
    return dense_mapper(weights("mapper_global"), states), torch.stack(mapped, dim=1)


def naive_self_attention(given: dict[str, Tensor], heads: int) -> Tensor:
    x, w = given["inputs.hidden_states"], {k: given[f"weights.attn1.to_{k}.weight"].T for k in "qkv"}
    out = softmax_attention(*(x @ w[k] for k in "qkv"), heads)
    return out @ given["weights.attn1.to_out.0.weight"].T + given["weights.attn1.to_out.0.bias"]


class NaiveElite:
    """Text attention of ELITE, one query of one head at a time."""

    def __init__(self, given: dict[str, Tensor], heads: int) -> None:
        self.given, self.heads = given, heads
        self.w = {k.split(".", 2)[2]: x for k, x in given.items() if k.startswith("weights.attn2.")}

    def text(
        self, text: Tensor, local: Tensor | None = None, scale: float = 1.0, rows: Sequence[int] | None = None
    ) -> Tensor:
        x, index = self.given["inputs.hidden_states"], self.given["inputs.local_index"]
        rows = range(len(x)) if rows is None else rows
        size = x.shape[-1] // self.heads
        parts = [slice(k * size, (k + 1) * size) for k in range(self.heads)]
        results, maps = dict[tuple[int, int, int], Tensor](), dict[tuple[int, int, int], Tensor]()
        of_patches = dict[tuple[int, int, int], Tensor]()
        for b in rows:
            q, k, v = (
                x[b] @ self.w["to_q.weight"].T,
                *(text[b] @ self.w[f"to_{y}_global.weight"].T for y in "kv"),
            )
            for head, part in enumerate(parts):
                for i in range(len(q)):
                    weights = self.softmax(k[:, part], q[i, part])
                    results[b, head, i], maps[b, head, i] = weights @ v[:, part], weights[index[b]]
                    if local is not None:
                        keys, values = (local[b] @ self.w[f"to_{y}_local.weight"].T for y in "kv")
                        of_patches[b, head, i] = self.softmax(keys[:, part], q[i, part]) @ values[:, part]
        top = max(m.item() for m in maps.values())
        for at, read in of_patches.items():
            results[at] = results[at] + scale * maps[at] / top * read
        merged = [
            [torch.cat([results[b, h, i] for h in range(self.heads)]) for i in range(x.shape[1])]
            for b in rows
        ]
        out = torch.stack([torch.stack(row) for row in merged])
        return out @ self.w["to_out.0.weight"].T + self.w["to_out.0.bias"]

    def softmax(self, keys: Tensor, query: Tensor) -> Tensor:
        scores = [float(key @ query) / math.sqrt(len(query)) for key in keys]
        exps = [math.exp(s - max(scores)) for s in scores]
        return torch.tensor([e / sum(exps) for e in exps], dtype=torch.float64)


# ---- Text2Video-Zero -----------------------------------------------------------------------------------------------


def text2video_file(
    *,
    side: int = 16,
    frames: int = 3,
    strengths: Sequence[tuple[int, int]] = ((12, 12), (-20, 8)),
    seed: int = 0,
) -> File:
    """A ``text2video_zero`` file: its attentions, and warps whose nearest latent is computed pixel by pixel."""
    random = Random(seed)
    info, tensors = attention_file(seed=seed)
    kept = ("inputs.hidden", "inputs.encoder", "weights.self.to_", "weights.cross.to_")
    tensors = {
        k: x
        for k, x in tensors.items()
        if k.startswith(kept) and not any(word in k for word in ("_global", "_new", "_exemplar"))
    }
    config = {**info["config"], "unet_chunk_size": info["config"]["batch"]}
    given = {k: x.double() for k, x in tensors.items()}
    for name in ("self", "cross"):
        tensors[f"outputs.{name}"] = Original({"config": config}, given, name).dense()
    x = tensors["inputs.x_t0_frame0"] = random.normal(1, 2, 1, side, side)
    names = {by: f"warp_h{side}_{by[0]}_{by[1]}".replace("-", "m") for by in strengths}
    for (dx, dy), name in names.items():
        moved = [naive_warp(x[0, :, 0], k * dx, k * dy) for k in range(1, frames + 1)]
        tensors[f"outputs.{name}"] = torch.stack(moved, dim=1)[None]
    x0 = tensors[f"outputs.{min(names.values())}"][:, :, :2].double()
    alphas, t0, t1 = 1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 300, 410
    eps = tensors["inputs.ddpm_eps"] = random.normal(*x0.shape)
    tensors["inputs.ddpm_alphas"], tensors["inputs.ddpm_t0_tmax"] = alphas, torch.tensor([t0, t1])
    kept_signal = math.prod(alphas[t0:t1].tolist())
    tensors["outputs.ddpm_forward"] = math.sqrt(kept_signal) * x0 + math.sqrt(1 - kept_signal) * eps.double()
    return {"source": "made by the tests", "config": config}, tensors


def naive_warp(x: Tensor, dx: float, dy: float, size: int = 512) -> Tensor:
    """Latents (c h w) moved by (dx, dy) pixels of `size`: half a pixel less, as their positions start at 0."""
    side, out = x.shape[-1], torch.empty_like(x)

    def nearest(i: int, by: float) -> int:
        at = i + (by - 0.5) * side / size
        period = 2 * side
        at = (at + 0.5) % period  # reflection about -0.5 and side - 0.5
        at = (period - at if at > side else at) - 0.5
        return min(max(round(at), 0), side - 1)

    for i in range(side):
        for j in range(side):
            out[:, i, j] = x[:, nearest(i, dy), nearest(j, dx)]
    return out


# ---- FreeNoise -----------------------------------------------------------------------------------------------------


def freenoise_file(
    *,
    frames: int = 11,
    window: int = 4,
    stride: int = 3,
    heads: int = 2,
    dim_head: int = 3,
    query_dim: int = 5,
    batch: int = 2,
    seed: int = 0,
) -> File:
    """A ``freenoise`` file: noise frame by frame, attention one query and one window at a time."""
    random, tensors = Random(seed), dict[str, Tensor]()
    steps = (frames - window) // stride
    total = window + steps * stride  # the original needs whole steps
    order = torch.Generator().manual_seed(seed)
    shuffles = [torch.randperm(stride, generator=order) + k * stride for k in range(steps)]
    noise = tensors["inputs.noise_a_initial"] = random.normal(1, 1, 2, total, 2, 2)
    tensors["inputs.noise_a_permutations"] = torch.stack(shuffles)
    source = list(range(total))
    for k, shuffle in enumerate(shuffles):
        for j, copied in enumerate(shuffle.tolist()):
            source[window + k * stride + j] = source[copied]
    tensors["outputs.noise_a_source_frame"] = torch.tensor(source)
    tensors["outputs.noise_a_rescheduled"] = torch.stack([noise[:, :, :, i] for i in source], dim=3).double()
    shape = {"heads": heads, "dim_head": dim_head, "query_dim": query_dim, "frames": frames, "window": window}
    config = {"noise_a": {"bs": 1, "frames": total, "win": window, "stride": stride}}
    for tag, relative in (("attn_plainly", False), ("attn_relative", True)):
        config[tag] = {
            **shape,
            "stride": stride,
            "relative_position": relative,
            "temporal_length": window - 1,
        }
        tensors[f"inputs.{tag}_x"] = random.normal(batch, frames, query_dim)
        inner = heads * dim_head
        for name in ("to_q", "to_k", "to_v"):
            tensors[f"weights.{tag}.{name}.weight"] = random.normal(inner, query_dim)
        tensors[f"weights.{tag}.to_out.0.weight"] = 0.3 * random.normal(query_dim, inner)
        tensors[f"weights.{tag}.to_out.0.bias"] = random.normal(query_dim)
        for name in ("k", "v") if relative else ():
            tensors[f"weights.{tag}.relative_position_{name}.embeddings_table"] = random.normal(
                2 * window - 1, dim_head
            )
        given = {k: x.double() for k, x in tensors.items() if tag in k}
        starts = [start for start in range(0, frames, stride) if start + window <= frames]
        tensors[f"outputs.{tag}_views"] = torch.tensor([[start, start + window] for start in starts])
        tensors[f"outputs.{tag}_weights"] = torch.tensor([min(i + 1, window - i) for i in range(window)])
        tensors[f"outputs.{tag}_windowed"] = naive_windows(given, tag, config[tag], starts)
    return {"source": "made by the tests", "config": config}, tensors


def naive_windows(given: dict[str, Tensor], tag: str, config: dict[str, int], starts: list[int]) -> Tensor:
    """One row, window, head and query after the other."""
    x, w = given[f"inputs.{tag}_x"], {k.removeprefix(f"weights.{tag}."): v for k, v in given.items()}
    heads, size, count, most = (config[k] for k in ("heads", "dim_head", "window", "temporal_length"))
    rows = []
    for row in x:
        q, k, v = (row @ w[f"to_{y}.weight"].T for y in "qkv")
        summed, shares = torch.zeros_like(q), [0.0] * len(row)
        for start in starts:
            for i in range(count):
                weight = min(i + 1, count - i)
                shares[start + i] += weight
                for head in range(heads):
                    part, query = slice(head * size, (head + 1) * size), q[start + i]
                    scores, values = [], []
                    for j in range(count):
                        key, value = k[start + j, part], v[start + j, part]
                        if config["relative_position"]:
                            at = max(-most, min(most, j - i)) + most
                            key = key + w["relative_position_k.embeddings_table"][at]
                            value = value + w["relative_position_v.embeddings_table"][at]
                        scores.append(float(query[part] @ key) / math.sqrt(size))
                        values.append(value)
                    exps = [math.exp(s - max(scores)) for s in scores]
                    read = sum(e / sum(exps) * value for e, value in zip(exps, values, strict=True))
                    summed[start + i, part] += weight * read
        fused = torch.stack([s / max(share, 1.0) for s, share in zip(summed, shares, strict=True)])
        rows.append(fused @ w["to_out.0.weight"].T + w["to_out.0.bias"])
    return torch.stack(rows)
