"""A stand-in for what Megatron-core hard-codes to CUDA, so that a tensor-parallel run can be tried and tested on CPU.

Its collectives make their buffers on ``torch.cuda.current_device()``. Here that is the CPU.
"""

import torch


def install() -> None:
    """Let ``torch.cuda.current_device()`` name the CPU, for this process. A second call does nothing.

    Raises:
        ValueError: there is a CUDA device, which Megatron-core would then be kept from.
    """
    if torch.cuda.is_available():
        raise ValueError(
            "'megatron_lora' on CPU stands in for what Megatron-core hard-codes to CUDA, which is refused on a machine "
            "with a CUDA device: use accelerator='gpu', or hide the devices with CUDA_VISIBLE_DEVICES="
        )
    torch.cuda.current_device = _cpu  # type: ignore[assignment]  # an index in torch; both name a device


def _cpu() -> torch.device:
    return torch.device("cpu")
