"""The Triton kernels for short sequences against float64, run by Triton's interpreter on the CPU.

The interpreter has to be chosen before Triton is imported, so this file runs itself once in a process of its own, which
prints what each check found. test_attention_cuda.py runs the compiled kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch
from attention_oracle import errors, random_case
from torch import Tensor

from dit_booth.attention import FramePlan, Segment, attend
from dit_booth.attention import joint_softmax as joint
from dit_booth.attention.kernels import choice as kernels
from dit_booth.attention.kernels import torch_ops
from dit_booth.attention.kernels.short import short_attention, short_attention_backward

torch.set_num_threads(1)
F16, F32, F64 = torch.float16, torch.float32, torch.float64
LIMITS = {F32: 2e-5, F16: 5e-3}

SIZES = [
    (1, 1, 8), (7, 17, 24), (16, 16, 72), (17, 7, 40), (33, 64, 72), (64, 33, 64), (16, 1, 128), (1, 64, 40),
]  # fmt: skip
OTHERS = ("odd_strides", "one_tensor", "overlapping", "expanded", "quiet")
HALF = SIZES[1:4]
"""Sizes of which float16 is tested, too: a kernel's blocks and masks are those of float32."""
NAMES = [
    *(f"{n} {m} {d} float32" for n, m, d in SIZES),
    *(f"{n} {m} {d} float16" for n, m, d in HALF),
]


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_results_and_gradients(name: str, found: dict[str, float]) -> None:
    """Forward; then backward, given the output and log-sum-exp of a softmax over more keys."""
    assert found[name] < LIMITS[F16 if "float16" in name else F32]


@pytest.mark.parametrize("name", ["joint 0", "joint 1", "joint 2", "compiled"])
def test_the_joint_softmax(name: str, found: dict[str, float]) -> None:
    assert found[name] < LIMITS[F32]


def test_the_operators_shapes_and_layouts(found: dict[str, float]) -> None:
    assert found["operators"] == 0


def test_importing_attention_imports_neither_triton_nor_the_compiler() -> None:
    """Seconds of every start."""
    code = (
        "import sys, dit_booth.attention\n"
        "print([m for m in sys.modules if m.startswith(('triton', 'torch._dynamo', 'torch._inductor'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# ---- what the other process does ---------------------------------------------------------------------------


def random(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def worst(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float = 0.3) -> float:
    """Largest error of the output, its log-sum-exp and the gradients, as shares of the largest numbers."""
    wide = [t.to(F64) for t in (dout, q, k, v)]
    out, lse = torch_ops.math_forward(*wide[1:], scale)
    ours = list(short_attention(q, k, v, scale))
    exact = [out, lse]
    # The same queries also read other keys, elsewhere: what backward gets is merged.
    others = [random(*k.shape, dtype=F64, seed=s) for s in (7, 8)]
    more, more_lse = torch_ops.math_forward(wide[1], *others, scale)
    out = out.lerp(more, torch.sigmoid(more_lse - lse).unsqueeze(-1)).to(q.dtype)
    lse = torch.logaddexp(lse, more_lse)
    strided = lse.float().transpose(1, 2).contiguous().transpose(1, 2)  # as `joint_softmax` has it
    ours += short_attention_backward(dout, q, k, v, out, strided, scale)
    exact += torch_ops.math_backward(*wide, out.to(F64), lse, scale)
    pairs = zip(ours, exact, strict=True)
    return max(((a.to(F64) - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs)


def plain(n: int, m: int, d: int, dtype: torch.dtype = F32) -> float:
    q, dout = (random(2, n, 3, d, dtype=dtype, seed=s).transpose(1, 2) for s in (1, 2))
    k, v = (random(2, 3, m, d, dtype=dtype, seed=s) for s in (3, 4))
    return worst(q, k, v, dout)


def odd_strides() -> float:
    """No vector is aligned."""
    q, k, v, dout = (random(2, 3, 18, 27, seed=s)[:, :, 1:18, 2:26] for s in range(4))
    return worst(q, k, v, dout)


def one_tensor() -> float:
    """Queries, keys and values side by side, as one projection gives them; of every other row."""
    q, k, v, dout = random(5, 7, 4, 3, 24)[::2].permute(2, 0, 3, 1, 4).unbind(0)
    return worst(q, k, v, dout)


def overlapping() -> float:
    """Rows whose keys are windows on those of the rows before."""
    k, v = (random(6, 5, 3, 8, seed=s).unfold(0, 2, 1) for s in (1, 2))  # row token head d frame
    k, v = (t.permute(0, 2, 4, 1, 3) for t in (k, v))
    k, v = (t.as_strided((5, 3, 10, 8), (5 * 24, 8, 24, 1), t.storage_offset()) for t in (k, v))
    q, dout = (random(5, 3, 7, 8, seed=s) for s in (3, 4))
    return worst(q, k, v, dout)


def expanded() -> float:
    """The gradient of a sum."""
    q, k, v = (random(2, 3, 9, 16, seed=s) for s in range(3))
    return worst(q, k, v, torch.ones(()).expand(q.shape))


def quiet() -> float:
    """Scores so low that those of keys that are none, 0, must not be exponentiated."""
    q, k, v, dout = (random(1, 2, 5, 8, seed=s) for s in range(4))
    q, k = 1 + q / 100, -50 + k / 100
    out, lse = short_attention(q, k, v, 0.3)
    gradients = short_attention_backward(dout, q, k, v, out, lse, 0.3)
    exact = torch_ops.math_backward(*(t.to(F64) for t in (dout, q, k, v, out)), lse.to(F64), 0.3)
    assert lse.max() < -100  # exp(100) is no float32
    return max((a - b).abs().max().item() / 50 for a, b in zip(gradients, exact, strict=True))


def joint_softmax(seed: int) -> float:
    case = random_case(seed, lengths=(1, 2, 3, 5, 7, 12), sizes=(8, 24, 40, 72))
    low = case.to(F32)
    return max(errors(lambda q, s: attend(q, s), low, low.to(F64)))


def compiled() -> float:
    """One graph, forward and backward."""
    q, k, v = (random(2, 3, 4, 2, 8, seed=s).requires_grad_() for s in range(3))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, [Segment(k, v, FramePlan("first+previous").frames(3))]).square().sum()

    run = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (run, loss))
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def operators() -> float:
    """Real results have the shapes and strides that torch.compile was told; tokens come before heads."""
    q, dout, k, v = (random(2, 3, n, 8) for n in (5, 5, 7, 7))
    out, lse = short_attention(q, k, v, 0.3)
    saved = (dout, q, k, v, out, lse, 0.3)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(short_attention, (q, k, v, 0.3), test_utils=tests)
    torch.library.opcheck(short_attention_backward, saved, test_utils=tests)
    for result in (out, *short_attention_backward(*saved)):
        assert result.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    empty = short_attention(*(t[:0] for t in (q, k, v)), 0.3)
    assert empty[0].shape == (0, 3, 5, 8)
    return 0.0


def checks() -> Iterator[tuple[str, Callable[[], float]]]:
    for (n, m, d), dtype in [*((size, F32) for size in SIZES), *((size, F16) for size in HALF)]:
        yield f"{n} {m} {d} {str(dtype).removeprefix('torch.')}", lambda a=(n, m, d, dtype): plain(*a)
    for check in (odd_strides, one_tensor, overlapping, expanded, quiet, operators, compiled):
        yield check.__name__, check
    for seed in range(3):
        yield f"joint {seed}", lambda seed=seed: joint_softmax(seed)


def main() -> None:
    joint.choose_kernel = lambda *_: kernels.SHORT  # the table gives it CUDA tensors only
    found = {name: check() for name, check in checks()}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
