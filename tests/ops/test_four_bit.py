"""4-bit codes: bit for bit bitsandbytes' own, in codes, scales and dense values."""

import bitsandbytes.functional as functional
import pytest
import torch

from lightning_lora.ops.four_bit import (
    BLOCK,
    SCALES_BLOCK,
    code_values,
    dense_4bit,
    dense_scales,
    dynamic_levels,
    quantize_4bit,
    quantize_scales,
)

CPU = torch.device("cpu")
# whole blocks, short last blocks, an odd number of values, less than a block
SHAPES = [(64, 64), (96, 128), (7, 13), (1, 1), (3, 576), (1, 127)]


@pytest.fixture(autouse=True)
def _eager():
    """bitsandbytes compiles its kernel for odd shapes, which takes longer than all that is tested here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def weights(shape: tuple[int, int], scale: float) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * scale
    values.view(-1)[:BLOCK] = 0  # a block of zeros
    return values


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_values_of_the_codes_are_bitsandbytes(kind):
    assert torch.equal(code_values(kind, CPU), functional.get_4bit_type(kind, device="cpu"))


def test_the_levels_of_scales_are_bitsandbytes():
    assert torch.equal(dynamic_levels(CPU), functional.create_dynamic_map())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 0.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_scales_and_values_are_bitsandbytes(kind, dtype, scale, shape):
    weight = weights(shape, scale).to(dtype)
    theirs, state = functional.quantize_4bit(weight, quant_type=kind)
    codes, scales = quantize_4bit(weight, kind)
    assert torch.equal(codes.view(-1)[: theirs.numel()], theirs.view(-1))
    assert torch.equal(scales, state.absmax)
    # as one row: where a row ends inside a block, bitsandbytes' CPU kernel takes the wrong scale
    state.shape = torch.Size([1, weight.numel()])
    expected = functional.dequantize_4bit(theirs, state).view(-1)
    assert torch.equal(dense_4bit(codes, scales, kind, dtype).view(-1)[: weight.numel()], expected)


@pytest.mark.parametrize("spread", [1.0, 0.0])
@pytest.mark.parametrize("count", [1, 255, 256, 3000])
def test_scales_are_rounded_to_the_nearest_level(count, spread):
    scales = 2.5 + spread * torch.rand(count, generator=torch.Generator().manual_seed(5))
    codes, nested, offset = quantize_scales(scales)
    centred = torch.nn.functional.pad(scales - scales.mean(), (0, -count % SCALES_BLOCK)).view(-1, SCALES_BLOCK)
    quotients = centred * (1 / centred.abs().amax(1, keepdim=True))
    nearest = (quotients[..., None] - dynamic_levels(CPU)).abs().argmin(-1).view(-1)[:count]
    assert torch.equal(codes, nearest.to(torch.uint8))
    theirs, state = functional.quantize_blockwise(scales - scales.mean(), blocksize=SCALES_BLOCK)
    assert torch.equal(nested, state.absmax)
    assert torch.equal(offset, scales.mean())
    # bitsandbytes' CPU kernel looks the level up in a coarse table: it is one off now and then
    assert (codes.int() - theirs.int()).abs().max() <= 1
    assert (codes != theirs).float().mean() < 0.01 or count == 1
    expected = functional.dequantize_blockwise(codes, state) + offset
    assert torch.equal(dense_scales(codes, nested, offset), expected)


def test_a_slice_of_blocks_is_that_slice_of_the_whole():
    weight = weights((64, 256), 1.0)
    codes, scales = quantize_4bit(weight, "nf4")
    part, part_scales = quantize_4bit(weight[16:48], "nf4")
    assert torch.equal(part, codes[64:192])
    assert torch.equal(part_scales, scales[64:192])
    small, nested, offset = quantize_scales(scales)
    assert torch.equal(
        dense_scales(small[64:192], nested, offset, first=64), dense_scales(small, nested, offset)[64:192]
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_scale_shows_what_is_not_finite(bad):
    weight = weights((4, 64), 1.0)
    weight[2, 5] = bad
    _, scales = quantize_4bit(weight, "nf4")
    assert torch.isfinite(scales).tolist() == [True, True, False, True]
