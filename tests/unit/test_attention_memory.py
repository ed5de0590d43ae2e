"""What CUDA holds at once, counted on tensors without storage: no GPU is needed."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_booth.attention import FramePlan, Segment, attend
from dit_booth.attention import joint_softmax as joint
from dit_booth.attention.calls import Calls
from dit_booth.attention.kernels import torch_ops
from dit_booth.attention.kernels.choice import Kernel

FRAME = 1024 * 8 * 64 * 2  # bytes (a MiB): tokens, heads, head size, bfloat16


class Held(TorchDispatchMode):
    """Bytes of the tensors that are alive and were made inside. What a kernel takes for itself is not seen."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.alive = {t.untyped_storage()._cdata: 0 for t in inputs}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("plan", ["first+previous", "self", "all"])
def test_beside_the_result_and_the_gradients_little_is_held(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 frames of 1024 tokens and an image of a frame's size: 67 MiB are the result and the gradients.

    With concatenated keys, values and their gradients it is 257 MiB for first+previous, 193 for self, 1153 for all (on
    an H100, docs/results/attention_gpu.md).
    """
    ran: list[tuple[Calls, Kernel, tuple[Tensor, ...]]] = []

    class Joint:
        @staticmethod
        def apply(calls: Calls, kernel: Kernel, *tensors: Tensor) -> Tensor:
            ran.append((calls, kernel, tensors))
            return tensors[0]

    monkeypatch.setattr(joint, "_JointSoftmax", Joint)
    monkeypatch.setattr(
        joint, "choose_kernel", lambda *_: Kernel(torch_ops.cudnn_forward, torch_ops.cudnn_backward)
    )
    with FakeTensorMode():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch_ops, "_processors", lambda _: 132)
        q, k, v, dout = (
            torch.empty(1, 16, 1024, 8, 64, dtype=torch.bfloat16, device="cuda") for _ in range(4)
        )
        image = [torch.empty(1, 1, 1024, 8, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        attend(q, [Segment(k, v, FramePlan(plan).frames(16)), Segment(*image, ((0,),) * 16)])
        ((calls, kernel, tensors),) = ran
        with Held([*tensors, dout]) as held:
            out, lse = joint._forward(calls, kernel, tensors)
            grads = joint._backward(calls, kernel, [True] * 5, *tensors, out, lse, dout)
        assert sum(t.numel() for t in grads if t is not None) == sum(t.numel() for t in tensors)
    assert held.most < 84 * FRAME
