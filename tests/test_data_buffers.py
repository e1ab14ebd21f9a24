"""Memory that is used again, and never while somebody holds it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.data.buffers import Buffers


def test_memory_that_nobody_holds_serves_the_next() -> None:
    buffers = Buffers()
    first = buffers.take((4, 8))
    place = first.data_ptr()
    del first
    again = buffers.take((2, 16))
    assert again.data_ptr() == place
    assert buffers.take((4, 8)).data_ptr() != place


HOLDERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "view": lambda images, weight: images[1:],
    "permuted": lambda images, weight: images.T,
    "storage": lambda images, weight: images.untyped_storage(),
    "numpy": lambda images, weight: images.numpy(),
    "graph": lambda images, weight: (images * weight).sum(),
}


@pytest.mark.parametrize("keep", HOLDERS)
def test_whatever_holds_it_keeps_it(keep: str) -> None:
    buffers = Buffers()
    images = buffers.take((3, 4)).fill_(2.0)
    weight = torch.ones(4, requires_grad=True)
    held: Any = HOLDERS[keep](images, weight)
    place = images.data_ptr()
    del images
    gc.collect()
    assert buffers.take((3, 4)).fill_(7.0).data_ptr() != place
    if keep == "graph":
        held.backward()
        assert weight.grad is not None
        assert torch.equal(weight.grad, torch.full((4,), 6.0))
    del held
    gc.collect()
    assert place in {one.data_ptr() for one in [buffers.take((3, 4)) for _ in range(2)]}


@given(st.lists(st.tuples(st.sampled_from([(2, 3), (6,), (4, 4)]), st.booleans()), max_size=30))
def test_no_two_that_are_held_share_memory(takes: list[tuple[tuple[int, ...], bool]]) -> None:
    buffers, held = Buffers(), []
    for number, (shape, keeps) in enumerate(takes):
        one = buffers.take(shape).fill_(number)
        if keeps:
            held.append((number, one))
    for number, one in held:
        assert (one == number).all()
