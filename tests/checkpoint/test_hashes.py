"""Exact hashes of frozen tensors: every changed bit is seen, in every dtype and layout."""

import pytest
import torch

from lightning_lora.checkpoint.hashes import exact_hashes

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.int64]


def exact_hash(tensor: torch.Tensor) -> int:
    return exact_hashes({"tensor": tensor})["tensor"]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.uint8], ids=str)
@pytest.mark.parametrize("numel", [1, 3, 8, 17])
def test_every_single_bit_counts(dtype: torch.dtype, numel: int) -> None:
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    hashes = {exact_hash(tensor)}
    for byte in range(numel * tensor.element_size()):
        for bit in range(8):
            changed = tensor.clone()
            changed.view(torch.uint8)[byte] ^= 1 << bit
            hashes.add(exact_hash(changed))
    assert len(hashes) == 1 + numel * tensor.element_size() * 8


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_signs_that_change_together_count(dtype: torch.dtype) -> None:
    tensor = torch.ones(2**10, dtype=dtype)
    signs = [torch.randint(0, 2, (2**10,), generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(200)]
    assert len({exact_hash(tensor * sign.to(dtype)) for sign in signs}) == 200


def test_values_that_change_places_count() -> None:
    tensor = torch.arange(2.0**19 + 1)  # more than a chunk
    assert exact_hash(tensor) not in (exact_hash(tensor.roll(2)), exact_hash(tensor.roll(2**19)))
    assert exact_hash(tensor) != exact_hash(tensor.flip(0))


def test_other_layouts_are_read() -> None:
    tensor = torch.randn(7, 5)
    assert exact_hash(tensor.t()) == exact_hash(tensor.t().contiguous())
    assert exact_hash(tensor.flatten()[1:]) == exact_hash(tensor.flatten()[1:])  # no multiple of eight bytes
    assert exact_hash(torch.zeros(3)) != exact_hash(torch.zeros(4))


def test_nothing_is_copied_but_a_chunk() -> None:
    tensor = torch.randn(2**22)
    exact_hash(tensor)
    with torch.profiler.profile(profile_memory=True) as profile:
        exact_hash(tensor)
    allocated = max((event.self_cpu_memory_usage for event in profile.events()), default=0)
    assert allocated <= 8 * 2**18
