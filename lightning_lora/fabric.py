"""The strategies for Fabric: twins of those for the Trainer, with the same options and the same files."""

from typing import Any

from torch import nn
from typing_extensions import override

from lightning_lora.megatron.core import parallel_state
from lightning_lora.strategies.fabric.sharded import FabricShardedStrategy
from lightning_lora.strategies.shared.fsdp import FSDPRanks
from lightning_lora.strategies.shared.megatron import MegatronRanks, check_first_batch


class FSDPLoRAStrategy(FSDPRanks, FabricShardedStrategy):
    """Shard the frozen base over all ranks with FSDP2 and keep the adapters whole; the twin for Fabric.

    The arguments are those of :class:`lightning_lora.FSDPLoRAStrategy`. ``fabric.setup(model, optimizer)`` takes the
    adapted model and an optimizer that was made for it before; ``fabric.no_backward_sync`` accumulates without
    communication.

    Example::

        fabric = Fabric(strategy="fsdp_lora", devices=2)
        fabric.launch()
        model = inject(model, LoRAConfig(r=8))
        model, optimizer = fabric.setup(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))
    """


class MegatronLoRAStrategy(MegatronRanks, FabricShardedStrategy):
    """Split the base over tensor-parallel ranks by its plan, adapters with it; the twin for Fabric.

    The arguments are those of :class:`lightning_lora.MegatronLoRAStrategy`. Megatron-core's groups exist after
    ``fabric.launch()`` if ``tensor_parallel_size`` is a number; ``"auto"`` takes it from the first model that is set
    up, which then comes before ``fabric.setup_dataloaders``. Models that are set up later are split by the same number.
    Ranks that share a model must be given the same data, as ``fabric.setup_dataloaders`` does.

    Example::

        fabric = Fabric(strategy="megatron_lora", devices=2)
        fabric.launch()
        model = inject(model, LoRAConfig(r=8))
        model, optimizer = fabric.setup(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))
        data = fabric.setup_dataloaders(data)
    """

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        if self._device_mesh is None:
            raise ValueError(
                "tensor_parallel_size='auto' takes the number of ranks that see the same data from the first model: "
                "call fabric.setup(model) before fabric.setup_dataloaders(...), or give the strategy a number"
            )
        self._check_groups()
        return super().distributed_sampler_kwargs

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self.tensor_parallel_size != "auto" or self.world_size == 1:
            self.form_groups(None)

    @override
    def place(self, model: nn.Module) -> None:
        if self._device_mesh is None:
            self.form_groups(model)
        self._check_groups()
        super().place(model)
        check_first_batch(model, self.device_mesh)

    def _check_groups(self) -> None:
        size, others = self.device_mesh.size(), parallel_state().get_tensor_model_parallel_world_size()
        if size != others:
            raise ValueError(
                f"another strategy has laid the ranks out since this one did: {others} share a model, and here {size}. "
                "Set up this one's models and data first, or use one tensor_parallel_size"
            )
