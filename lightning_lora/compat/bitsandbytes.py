"""Private names of bitsandbytes, which is looked up where a model holds its layers, and never imported."""

import sys
from typing import Any

from lightning_lora.compat.lookup import private


def unpack_from_cpu_format(weight: Any, state: Any) -> Any:
    """Put the codes of a weight back in bitsandbytes' own order, in place, and return their state.

    In eval mode its forward reorders them for CPUs with AVX512-BF16. Relies on the function by which its state dicts
    undo that; without it raises.
    """
    functional = sys.modules["bitsandbytes.functional"]
    unpack = private("bitsandbytes", functional, "_convert_weight_packed_for_cpu_inverse")
    weight.data, weight.quant_state = unpack(weight.data, state)
    return weight.quant_state
