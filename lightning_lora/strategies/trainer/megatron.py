"""``MegatronLoRAStrategy``: tensor parallelism with Megatron-core's groups and collectives, for the Trainer."""

from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from lightning_lora.strategies.shared.megatron import MegatronRanks, check_same_batch
from lightning_lora.strategies.trainer.evaluation import check_equal_evaluation
from lightning_lora.strategies.trainer.sharded import ShardedStrategy


class MegatronLoRAStrategy(MegatronRanks, ShardedStrategy):
    """Split the base over tensor-parallel ranks, adapters with it; what ranks are left are data-parallel.

    The linear layers of a model with a plan become column- and row-parallel in place: their names, and the model's own
    code, stay as they are. Megatron-core's ``GPTModel`` is built in ``configure_model``, each rank its parts. An
    adapter's term is added where its base's is, inside the base's collectives; with sequence parallelism column layers
    exchange r numbers per token besides. Once per optimizer step all gradients of whole factors are summed in one
    all-reduce. The checkpoint is the single adapter-only file of every other strategy.

    Args:
        tensor_parallel_size: ranks that share a model. ``"auto"`` takes the smallest, two at least, that divides the
            ranks and the model's heads and whose share of the base fills at most half a device. Of a model that is
            built in ``configure_model`` neither heads nor size are known yet: give a number then.
        plan: ``{"layers.*.attention.query": "colwise", ...}``, instead of transformers' ``base_model_tp_plan``.
        base_weights: as for :class:`~lightning_lora.FSDPLoRAStrategy`: each rank reads its slices of a base on meta.
        process_group_backend: ``"nccl"``, ``"gloo"``, ...; ``None`` takes the device's.
        timeout: of collectives.

    Raises:
        ValueError, TypeError: an option is not served (at once), or the model cannot be split (at ``setup``).
        ImportError: megatron-core is missing or of another version; the message says what to install.

    Example::

        trainer = L.Trainer(callbacks=[LoRACallback(r=8)], strategy="megatron_lora", devices=8)
    """

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self.form_groups(self.lightning_module)

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        super().setup(trainer)
        check_equal_evaluation(trainer, self.device_mesh.get_group())

    @override
    def random_state_of_this_rank(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        first = torch.distributed.get_global_rank(self.device_mesh.get_group(), 0)
        # ranks that share a model now may not have shared one when the file was written
        return {**states[first], "megatron": super().random_state_of_this_rank(states).get("megatron", {})}

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if not self._checked_batch:
            check_same_batch(args, self.device_mesh)
            self._checked_batch = True
        return super().training_step(*args, **kwargs)
