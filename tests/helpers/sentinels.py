"""Detects writes outside of the tensors that a launch makes."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
AROUND = 64


class _Guards(TorchDispatchMode):
    """Gives each new tensor as the middle of a longer one, whose ends hold a known pattern."""

    def __init__(self):
        super().__init__()
        self.whole = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket
        if name not in (
            aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.new_empty_strided,
            aten.zeros, aten.new_zeros, aten.zeros_like,
        ):  # fmt: skip
            return made
        n = made.untyped_storage().nbytes() // made.element_size()
        whole = torch.full((n + 2 * AROUND,), 77, dtype=made.dtype, device=made.device)
        inner = whole[AROUND : AROUND + n]
        inner.fill_(0 if "zeros" in str(name) else 55)
        self.whole.append(whole)
        return torch.as_strided(inner, made.shape, made.stride(), AROUND)


@contextmanager
def guarded():
    """Fails if anything writes outside of the tensors made inside; checks that there were some."""
    with _Guards() as guards:
        yield
    assert guards.whole
    for whole in guards.whole:
        ends = torch.cat([whole[:AROUND], whole[-AROUND:]])
        assert (ends == 77).all(), "memory beside an output was written"
