"""Buffers return to the pool when nothing refers to them any more, and never before."""

import gc

import torch

from rdm_scale.data.buffer_pool import BufferPool, as_memoryview

SIZE = 10**6


def test_a_buffer_is_used_again_when_its_tensor_is_gone() -> None:
    pool = BufferPool()
    one = pool.take(SIZE)
    at = one.data_ptr()
    assert one.dtype == torch.uint8 and one.shape == (SIZE,)
    other = pool.take(SIZE)
    assert abs(other.data_ptr() - at) >= SIZE
    assert pool.free_bytes == 0
    del one
    gc.collect()
    assert pool.free_bytes == 2**20
    assert pool.take(SIZE - 5).data_ptr() == at


def test_a_view_of_any_kind_keeps_a_buffer_in_use() -> None:
    pool = BufferPool()
    kept = [
        pool.take(SIZE).view(torch.float32).view(1000, 250)[3:],
        pool.take(SIZE).numpy()[5:],
        as_memoryview(pool.take(SIZE))[7:],
        torch.from_numpy(pool.take(SIZE).numpy()[1:]),
        pool.take(SIZE).untyped_storage(),
    ]
    gc.collect()
    taken = [pool.take(SIZE) for _ in range(5)]
    for tensor in taken:
        tensor.fill_(1)
    for view in kept:
        if isinstance(view, torch.Tensor):
            view.zero_()
    assert len({tensor.data_ptr() for tensor in taken}) == 5
    assert all(tensor.eq(1).all() for tensor in taken)
    assert pool.free_bytes == 0


def test_small_buffers_are_not_kept() -> None:
    pool = BufferPool()
    assert pool.take(0).shape == (0,) and pool.take(100).shape == (100,)
    gc.collect()
    assert pool.free_bytes == 0
