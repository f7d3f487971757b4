"""``FSDPLoRAStrategy``: the frozen base sharded with FSDP2, the adapters whole, one adapter-only checkpoint."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_lora.compat.lightning import set_device_mesh
from lightning_lora.distributed.gradients import GradientReducer
from lightning_lora.distributed.sharded_gradients import sharded_trainables
from lightning_lora.distributed.sharding import shards_summary
from lightning_lora.strategies.shared.fsdp import UNFROZEN, FSDPRanks
from lightning_lora.strategies.trainer.evaluation import UnequalEvaluation
from lightning_lora.strategies.trainer.sharded import ShardedStrategy

_READ_IN_SHARDS = (
    "A base weight was read while it was in shards: outside the forward of the module that it is sharded with. Give "
    "the strategy shard_modules=[...] with a module whose forward is around the reading, or raise min_shard_numel, so "
    "that the tensor stays whole"
)
_GRADIENTS_IN_SHARDS = (
    " Or gradients of adapters in shards were read beside whole ones, as torch.nn.utils.clip_grad_norm_ does: clip "
    "with Trainer(gradient_clip_val=...), self.clip_gradients(...) or fabric.clip_gradients(...)"
)


class FSDPLoRAStrategy(FSDPRanks, ShardedStrategy):
    """Shard the frozen base over all ranks with FSDP2 (``fully_shard``), block by block, and keep the adapters whole.

    A base parameter is gathered for the forward and the backward of its block and dropped again. The base has no
    gradients and so no gradient traffic; those of the adapters are averaged in one all-reduce per optimizer step.
    Checkpoints are the single adapter-only file of every other strategy, from and for any number of ranks; the base is
    never gathered for one. The user's LightningModule needs no code for any of this.

    The model stays in shards after the run: forward, ``generate``, ``merge`` and ``save_peft`` are then for all ranks
    together, in a script that still runs on all of them. To go on in one process, build the model anew and
    give it the checkpoint or the PEFT directory.

    Args:
        replicate_size: hybrid sharding: so many groups of ranks each hold the whole base between them, which keeps the
            gathering inside a node. It must divide the number of ranks.
        shard_modules: the modules to shard as one unit each, by class name or end of name (``["Block"]``), instead of
            the blocks that are found: transformers' ``_no_split_modules``, else the members of module lists.
        shard_adapters: shard the adapters too, and what else trains inside the pretrained model: for adapters that are
            too large to replicate. Their gradients are then reduce-scattered with their block.
        min_shard_numel: tensors outside the blocks with fewer elements stay whole. A small model's embeddings do.
        base_weights: a safetensors file, or a directory with one or with ``model.safetensors.index.json``, to fill a
            model from that was built under ``torch.device("meta")``. Each rank reads its own slices. The names in it
            are those inside the adapted model, which is the whole LightningModule unless it holds a transformers model
            or ``LoRACallback(module=...)`` names one. A transformers model that knows its local directory needs none.
        reshard_after_forward: drop a block's gathered weights after its forward, and gather them again for backward.
            ``False`` keeps them: one gather less per step, for the memory of the whole base.
        activation_checkpointing: keep only the inputs of the blocks for backward.
        compile: ``torch.compile`` the blocks; a string is the backend's name.
        cpu_offload: keep the base's shards in host memory.
        process_group_backend: ``"nccl"``, ``"gloo"``, ...; ``None`` takes the device's.
        timeout: of collectives.

    Raises:
        ValueError, TypeError: an option is wrong (at once), or the model cannot be served (at ``setup``).

    Example::

        trainer = L.Trainer(callbacks=[LoRACallback(r=8)], strategy="fsdp_lora", devices=8)
    """

    _evaluation: UnequalEvaluation

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        super().setup(trainer)
        assert self.model is not None
        self._evaluation = UnequalEvaluation(trainer, self.model)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluation.before_batch()
        return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluation.before_batch()
        return super().test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluation.before_batch()
        return super().predict_step(*args, **kwargs)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        assert self.lightning_module is not None
        set_device_mesh(self.lightning_module, self._device_mesh)

    @override
    def place(self, model: nn.Module) -> None:
        super().place(model)
        rank_zero_info(shards_summary(model))

    @override
    def make_reducers(self, model: nn.Module) -> list[GradientReducer]:
        self._trained_in_shards = set()  # of an earlier fit
        return super().make_reducers(model)

    @override
    def on_exception(self, exception: BaseException) -> None:
        unfrozen = self.model is not None and any(
            id(parameter) not in self._trained_in_shards for parameter in sharded_trainables(self.model)
        )
        read = _READ_IN_SHARDS + (_GRADIENTS_IN_SHARDS if self._trained_in_shards else "")
        explain_mixed_tensors(exception, UNFROZEN if unfrozen else read)
        super().on_exception(exception)


def explain_mixed_tensors(exception: BaseException, advice: str) -> None:
    """Add to torch's error about a sharded tensor beside a whole one what to do about it."""
    if exception.args and "mixed torch.Tensor and DTensor" in str(exception.args[0]):
        exception.args = (f"{exception.args[0]} {advice}", *exception.args[1:])
