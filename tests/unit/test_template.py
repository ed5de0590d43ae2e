"""A template's copies equal the module, and are modules of their own."""

from __future__ import annotations

import torch
from torch import nn

from dit_booth.testing import trial, worst
from dit_booth.testing.template import Template


def test_a_copy_has_its_own_tensors_and_all_that_is_shared() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(3, 4))
    module[3].weight = module[0].weight
    module[2].requires_grad_(False)
    template = Template(module)
    copy, other = template.copy(), template.copy()
    assert copy[3].weight is copy[0].weight
    for name, tensor in module.state_dict(keep_vars=True).items():
        mine = copy.state_dict(keep_vars=True)[name]
        assert torch.equal(mine, tensor) and type(mine) is type(tensor), name
        assert mine.requires_grad == tensor.requires_grad, name
        assert len({x.data_ptr() for x in (mine, tensor, other.state_dict()[name])}) == 3, name
    with torch.no_grad():
        copy[0].weight.add_(1)
    assert worst(copy[0].weight, other[0].weight) == worst(copy[0].weight, module[0].weight) > 0.5


def test_a_backbone_s_copies_train_alone() -> None:
    one, two = trial("kv_concat", "unet"), trial("kv_concat", "unet")
    before = two(two.reference())
    assert torch.equal(one(one.reference()), before)
    with torch.no_grad():
        for p in one.model.parameters():
            p.mul_(1.5)
    assert torch.equal(two(two.reference()), before)
    assert worst(one(one.reference()), before) > 1e-3
