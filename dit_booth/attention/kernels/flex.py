"""FlexAttention with a block mask: the whole joint softmax in one call, over concatenated segments.

A baseline, used only when named: it concatenates the segments' keys (once, never repeated per frame), and supports
neither a segment's own queries nor, on the CPU, gradients. It is compiled as a graph of its own.
Importing this module imports PyTorch's compiler, so `choice.py` imports it on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dit_booth.attention.plans import Frames
from dit_booth.attention.tracing import untraced

BLOCK = 128


@untraced
def flex_attend(
    tensors: Sequence[Tensor],
    positions: tuple[tuple[int, int, int], ...],
    frames: tuple[Frames, ...],
    scales: tuple[float, ...],
) -> Tensor:
    """Compute the joint softmax of `attend`; arguments as for `choice.JointKernel`."""
    if any(query for query, _, _ in positions):
        raise ValueError(
            "attention kernel 'flex' takes one query per frame, but a segment has its own; use auto or another kernel"
        )
    q = tensors[0]
    scale = scales[0] if len(set(scales)) == 1 else 1.0
    ks = [
        tensors[k] if scale == s else tensors[k] * s for (_, k, _), s in zip(positions, scales, strict=True)
    ]
    k, v = (
        torch.cat([rearrange(t, "b g m k d -> b k (g m) d") for t in part], dim=2)
        for part in (ks, [tensors[v] for _, _, v in positions])
    )
    mask = block_mask(frames, q.shape[2], tuple((t.shape[1], t.shape[2]) for t in ks), q.device)
    q = rearrange(q, "b f n k d -> b k (f n) d")
    out: Tensor = _compiled()(q, k, v, block_mask=mask, scale=scale)
    return rearrange(out, "b k (f n) d -> b f n k d", f=tensors[0].shape[1])


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=64)
def block_mask(
    frames: tuple[Frames, ...], n: int, sizes: tuple[tuple[int, int], ...], device: torch.device
) -> BlockMask:
    """Build the mask of BLOCK x BLOCK scores from the visibilities; sizes: (groups, tokens) of each segment.

    Built from frames and groups in (f n / BLOCK)^2 operations, where `create_block_mask` takes (f n)^2.
    """
    visible = torch.cat([_table(f, groups) for f, (groups, _) in zip(frames, sizes, strict=True)], dim=1)
    group_of = torch.repeat_interleave(
        torch.arange(visible.shape[1]), torch.tensor([m for groups, m in sizes for _ in range(groups)])
    )
    frame_of = torch.arange(visible.shape[0]).repeat_interleave(n)
    rows, columns = _touched(frame_of, visible.shape[0]), _touched(group_of, visible.shape[1])
    touched = rows @ visible @ columns.T > 0
    full = (rows @ (1 - visible) @ columns.T == 0) & touched
    full[len(frame_of) // BLOCK :] = False  # ragged blocks at the ends have scores to hide
    full[:, len(group_of) // BLOCK :] = False
    table, frame_of, group_of = visible.bool().to(device), frame_of.to(device), group_of.to(device)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return table[frame_of[i], group_of[j]]

    return BlockMask.from_kv_blocks(
        *_block_lists(touched & ~full, device),
        *_block_lists(full, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(len(frame_of), len(group_of)),
    )


def _table(frames: Frames, groups: int) -> Tensor:
    """Return (frames, groups): 1 where a frame reads a group."""
    table = torch.zeros(len(frames), groups)
    for i, read in enumerate(frames):
        table[i, list(read)] = 1
    return table


def _touched(owner: Tensor, owners: int) -> Tensor:
    """Return (blocks, owners): 1 where a block of BLOCK tokens has tokens of an owner."""
    block = torch.arange(len(owner)) // BLOCK
    touched = torch.zeros(int(block[-1]) + 1, owners)
    touched[block, owner] = 1
    return touched


def _block_lists(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return each row's number of blocks, and its columns with those first; with leading batch and head axes."""
    count = blocks.sum(-1, dtype=torch.int32)
    columns = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True).int()
    return count[None, None].to(device), columns[None, None].contiguous().to(device)
