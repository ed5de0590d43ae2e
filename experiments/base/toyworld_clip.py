"""Train the embedded tiny CLIPs on the toy world: image prompts and video frames against captions (CLIP, section 2).

python experiments/base/toyworld_clip.py --steps 800 --out dit_booth/assets/clip.safetensors
python experiments/base/toyworld_clip.py --steps 600 --start embedded --train image  # it follows the text tower
for seed in 101 102 103; do  # the judges of evaluation, which no network is conditioned on
    python experiments/base/toyworld_clip.py --model dit-booth-judge --steps 900 --seed $seed --lr 2e-3 \\
        --out dit_booth/assets/judge-$seed.safetensors --log docs/results/judge_$seed.jsonl
done

The text feature also has to tell the words of its caption. Random captions of a batch differ in so much else that
their contrast never needs the word of the motion, and a base trained on that text tower ignores it, too.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from dit_booth.data.example import Batch, Loader
from dit_booth.data.toyworld import Toyworld, ToyworldConfig
from dit_booth.models.clip.encoders import (
    ClipConfig,
    TextEncoder,
    build_clip_model,
    clip_state_dict,
    contrastive_forward,
)
from dit_booth.models.weights import write

WORDS_WEIGHT = 10.0
"""Weight of the words' loss: most words are learnt soon, and the rest of it is small beside CLIP's."""


@dataclass(frozen=True, kw_only=True)
class ClipArguments:
    steps: int = 600
    """Optimizer steps."""
    batch_size: int = 128
    """Image-caption pairs in a step; half are image prompts, half frames."""
    lr: float = 1e-3
    """Peak learning rate, after 50 steps of warm-up, cosine to zero."""
    model: str = "dit-booth-tiny"
    """The architecture: dit-booth-tiny conditions the networks, dit-booth-judge only judges their videos."""
    start: Literal["none", "embedded"] = "none"
    """Random weights, or the package's."""
    train: Literal["both", "image"] = "both"
    """Both towers, or the image tower alone, against the text tower as it is."""
    workers: int = 1
    """Processes that render."""
    seed: int = 0
    """Seed of weights and data."""
    out: str = "dit_booth/assets/clip.safetensors"
    """File of the weights, in float16."""
    log: str = "docs/results/toyworld_clip.jsonl"
    """File of the losses."""


def main(settings: ClipArguments) -> None:
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = (
        build_clip_model(ClipConfig(model=settings.model, pretrained=settings.start))
        .requires_grad_(True)
        .to(device)
    )
    text = TextEncoder(model).requires_grad_(settings.train == "both")
    tell = nn.Linear(text.embed_dim, len(text.token_embedding.weight)).to(device)
    world = Toyworld(ToyworldConfig(frames=2, size=32, seed=settings.seed, describe="full"))
    stream = Loader(
        world, batch_size=settings.batch_size, seed=settings.seed, workers=settings.workers
    ).stream(0)
    parameters = [p for p in (*model.parameters(), *tell.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, settings.lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, settings.steps))
    log, start = [], time.time()
    for step in range(settings.steps):
        images, captions = pairs(next(stream).to(device))
        prompt = text.tokenize(captions)
        image, words, scale = contrastive_forward(model, images, prompt)
        loss, accuracy = contrastive_loss(scale * image @ words.T)
        token_loss = words_loss(tell(scale.detach() * words), prompt.ids)
        optimizer.zero_grad()
        (loss + WORDS_WEIGHT * token_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            dict(model.named_parameters())["logit_scale"].clamp_(max=4.6052)  # 100, as in CLIP
        if step % 25 == 24:
            row = {"loss": loss.item(), "accuracy": accuracy.item(), "words_loss": token_loss.item()}
            log.append({"step": step + 1, **row, "s": time.time() - start})
            print(json.dumps(log[-1]), flush=True)
    write(Path(settings.out), clip_state_dict(model.cpu(), torch.float16))
    Path(settings.log).write_text("".join(json.dumps(line) + "\n" for line in log))


def learning_rate(step: int, steps: int) -> float:
    """Return the learning rate: warm-up over 50 steps, then cosine to zero, as a share of the peak."""
    return min(1.0, (step + 1) / 50) * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / steps))))


def pairs(batch: Batch) -> tuple[Tensor, list[str]]:
    """Half image prompts with the subject's looks, half frames with the whole caption."""
    half = len(batch) // 2
    images = torch.cat([batch.image[:half], batch.video[half:, 0]])  # b c h w
    looks = [caption.split(" is ")[0] for caption in batch.captions[:half]]
    return images, looks + batch.captions[half:]


def contrastive_loss(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Compute CLIP's symmetric cross-entropy over a batch, and the share of captions that find their image."""
    target = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, (logits.argmax(0) == target).float().mean()


def words_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Compute the binary cross-entropy of the tokens of each caption; logits (b v), ids (b l)."""
    seen = ids.unique()
    has = torch.zeros_like(logits).scatter_(1, ids, 1.0)
    return F.binary_cross_entropy_with_logits(logits[:, seen], has[:, seen])


if __name__ == "__main__":
    main(tyro.cli(ClipArguments, description=__doc__))
