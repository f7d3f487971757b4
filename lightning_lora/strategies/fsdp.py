"""``FSDPLoRAStrategy``: the frozen base sharded with FSDP2, the adapters whole, one adapter-only checkpoint."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.checkpoint.optimizer_state import names_of
from lightning_lora.distributed.gradients import GradientReducer, drop_unused
from lightning_lora.distributed.sharding import (
    MIN_SHARD_NUMEL,
    ShardingOptions,
    set_gradient_sync,
    shard,
    sharded_trainables,
    shards_summary,
)
from lightning_lora.model.gathered import reshard
from lightning_lora.model.layerdrop import drops_layers
from lightning_lora.model.state import injected_roots
from lightning_lora.ops.sharded import is_sharded
from lightning_lora.strategies.evaluation import UnequalEvaluation
from lightning_lora.strategies.launched import Launched, check_keywords
from lightning_lora.strategies.spread import SpreadStrategy

_UNFROZEN = (
    "a base parameter was unfrozen after the base was sharded, and would not train: name its module in modules_to_save "
    "from the start, or use strategy='ddp' to unfreeze during a run"
)
_READ_IN_SHARDS = (
    "A base weight was read while it was in shards: outside the forward of the module that it is sharded with. Give "
    "the strategy shard_modules=[...] with a module whose forward is around the reading, or raise min_shard_numel, so "
    "that the tensor stays whole"
)
_GRADIENTS_IN_SHARDS = (
    " Or gradients of adapters in shards were read beside whole ones, as torch.nn.utils.clip_grad_norm_ does: clip "
    "with Trainer(gradient_clip_val=...), self.clip_gradients(...) or fabric.clip_gradients(...)"
)


class FSDPRanks(Launched):
    """Mixin of the strategies for Trainer and Fabric: their options, and the ranks as a mesh."""

    shards = True
    _lightning_base: type[Any]

    def __init__(
        self,
        replicate_size: int = 1,
        shard_modules: list[str] | None = None,
        shard_adapters: bool = False,
        min_shard_numel: int = MIN_SHARD_NUMEL,
        base_weights: str | None = None,
        reshard_after_forward: bool = True,
        activation_checkpointing: bool = False,
        compile: bool | str = False,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        **kwargs: Any,
    ) -> None:
        check_keywords(type(self), kwargs, self._lightning_base)
        super().__init__(**kwargs)
        self.options = ShardingOptions(
            replicate_size=replicate_size,
            shard_modules=shard_modules,
            shard_adapters=shard_adapters,
            min_shard_numel=min_shard_numel,
            base_weights=base_weights,
            reshard_after_forward=reshard_after_forward,
            activation_checkpointing=activation_checkpointing,
            compile=compile,
            cpu_offload=cpu_offload,
        )
        self._process_group_backend = process_group_backend
        self._timeout = timeout
        self._trained_in_shards: set[int] = set()

    def refuse_layerdrop(self, model: nn.Module) -> None:
        """Raise ``ValueError`` for a model with layerdrop: each rank would skip, and so not gather, other layers."""
        if self.device_mesh.size() == 1:
            return
        for root in injected_roots(model).values():
            for name, probability in drops_layers(root).items():
                raise ValueError(
                    f"{name or type(root).__name__!r} has layerdrop={probability:g}, so each rank would skip "
                    "other layers, and all ranks gather each layer's weights together: set layerdrop to 0 in the "
                    "model's config (from_pretrained(..., layerdrop=0.0); encoder_layerdrop and decoder_layerdrop "
                    "where it has them), or use strategy='ddp'"
                )

    def setup_environment(self) -> None:
        """Find the other ranks and lay them out: ``("data_parallel",)``, or ``("replicate", "data_parallel")``."""
        super().setup_environment()  # type: ignore[misc]  # Lightning's
        self._connect()
        world_size = torch.distributed.get_world_size()
        self._device_mesh = make_mesh(self.root_device, world_size, self.options.replicate_size)


class FSDPLoRAStrategy(FSDPRanks, SpreadStrategy):
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

    strategy_name = "fsdp_lora"
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
        self.lightning_module._device_mesh = self._device_mesh

    @override
    def place(self, model: nn.Module) -> None:
        shard(model, self.device_mesh, self.root_device, self.options, gathering_dtype(self.precision_plugin))
        rank_zero_info(shards_summary(model))

    @override
    def make_reducers(self, model: nn.Module) -> list[GradientReducer]:
        self.refuse_layerdrop(model)
        self._trained_in_shards = set(map(id, sharded_trainables(model)))
        return [GradientReducer(model.parameters(), names=names_of(model))]

    @override
    def _before_step(self, optimizer: Optimizer, *, reduces: bool) -> None:
        refuse_unfrozen(optimizer, self._trained_in_shards)
        if self._trained_in_shards and not self.options.reshard_after_forward:
            assert self.lightning_module is not None
            reshard(self.lightning_module)  # a forward since the backward left copies, which would outlive the step
        super()._before_step(optimizer, reduces=reduces)

    @override
    def after_reduction(self, model: nn.Module) -> None:
        if self._trained_in_shards:
            drop_unused(model)

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        assert self.model is not None
        with no_sync(self.model, self._reducers[0]):
            yield

    @override
    def on_exception(self, exception: BaseException) -> None:
        unfrozen = self.model is not None and any(
            id(parameter) not in self._trained_in_shards for parameter in sharded_trainables(self.model)
        )
        read = _READ_IN_SHARDS + (_GRADIENTS_IN_SHARDS if self._trained_in_shards else "")
        explain_mixed_tensors(exception, _UNFROZEN if unfrozen else read)
        super().on_exception(exception)


def make_mesh(device: torch.device, world_size: int, replicate_size: int) -> DeviceMesh:
    """Return the mesh of all ranks: one dimension, or replicas of shards."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"'fsdp_lora' runs on CUDA devices and on CPU, not on {device.type!r}")
    if "ignored_params" not in inspect.signature(fully_shard).parameters or not hasattr(
        FSDPModule, "set_unshard_in_backward"
    ):
        raise ValueError(f"'fsdp_lora' needs a newer torch than {torch.__version__}; 2.13 is what it is tested with")
    if world_size % replicate_size:
        raise ValueError(f"replicate_size={replicate_size} does not divide the {world_size} ranks")
    if replicate_size == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("data_parallel",))
    shape = (replicate_size, world_size // replicate_size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "data_parallel"))


def gathering_dtype(precision: Any) -> torch.dtype | None:
    """Return the dtype that mixed precision gathers base weights in, or ``None`` for their own."""
    name = str(getattr(precision, "precision", ""))
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(name)


def refuse_unfrozen(optimizer: Optimizer, served: set[int]) -> None:
    """Raise ``ValueError`` for an optimizer with parameters that were frozen when they were sharded.

    Args:
        served: identities of those that trained then.
    """
    for group in optimizer.param_groups:
        if any(is_sharded(p) and p.requires_grad and id(p) not in served for p in group["params"]):
            raise ValueError(_UNFROZEN)


@contextmanager
def no_sync(model: nn.Module, reducer: GradientReducer) -> Iterator[None]:
    """Let gradients accumulate on each rank inside the block."""
    spread = bool(sharded_trainables(model))
    if spread:
        set_gradient_sync(model, False)
    try:
        with reducer.no_sync():
            yield
    finally:
        if spread:
            set_gradient_sync(model, True)


def explain_mixed_tensors(exception: BaseException, advice: str) -> None:
    """Add to torch's error about a sharded tensor beside a whole one what to do about it."""
    if exception.args and "mixed torch.Tensor and DTensor" in str(exception.args[0]):
        exception.args = (f"{exception.args[0]} {advice}", *exception.args[1:])
