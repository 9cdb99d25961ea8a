"""Memory that comes back when nobody uses it any more, and never before."""

import gc

import torch

from rdm_scale.data.buffer_pool import Memory, as_bytes

SIZE = 10**6


def test_memory_comes_back_when_its_tensor_is_gone() -> None:
    memory = Memory()
    one = memory.take(SIZE)
    at = one.data_ptr()
    assert one.dtype == torch.uint8 and one.shape == (SIZE,)
    other = memory.take(SIZE)
    assert abs(other.data_ptr() - at) >= SIZE
    del one
    gc.collect()
    assert memory.take(SIZE - 5).data_ptr() == at


def test_a_view_of_any_kind_keeps_it() -> None:
    memory = Memory()
    kept = [
        memory.take(SIZE).view(torch.float32).view(1000, 250)[3:],
        memory.take(SIZE).numpy()[5:],
        as_bytes(memory.take(SIZE))[7:],
        torch.from_numpy(memory.take(SIZE).numpy()[1:]),
        memory.take(SIZE).untyped_storage(),
    ]
    gc.collect()
    taken = [memory.take(SIZE) for _ in range(5)]
    for tensor in taken:
        tensor.fill_(1)
    for view in kept:
        if isinstance(view, torch.Tensor):
            view.zero_()
    assert len({tensor.data_ptr() for tensor in taken}) == 5
    assert all(tensor.eq(1).all() for tensor in taken)
    assert len(memory._spare[2**20]) == 0


def test_little_memory_is_not_kept() -> None:
    memory = Memory()
    assert memory.take(0).shape == (0,) and memory.take(100).shape == (100,)
    assert not memory._spare
