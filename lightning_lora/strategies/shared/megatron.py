"""Options, process groups and placement of ``megatron_lora``, for Trainer and Fabric.

Models with a plan are split when they are placed; Megatron-core's own are built in parts.
"""

import os
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from lightning_lora.checkpoint.fingerprint import remember_fingerprint
from lightning_lora.checkpoint.optimizer_matching import names_of
from lightning_lora.compat.torch import tree_leaves
from lightning_lora.distributed.base_weights import materialize
from lightning_lora.distributed.gradients import GradientReducer
from lightning_lora.distributed.replication import broadcast_replicated, differ, make_equal, move_to, refuse_other_sizes
from lightning_lora.megatron import cpu as megatron_cpu
from lightning_lora.megatron.core import (
    check_contract,
    count_batches_once,
    is_gpt,
    megatron_core,
    mesh_of,
    parallel_state,
)
from lightning_lora.megatron.parts import check_built, keep_parts, let_gradients_through_recomputed
from lightning_lora.megatron.tensor_parallel import check_replicated, split
from lightning_lora.megatron.tp_plan import heads_of, plan_of
from lightning_lora.megatron.weights import load_hf_weights
from lightning_lora.model.own_parameters import owners
from lightning_lora.model.spread import guard_parts
from lightning_lora.model.state import injected_roots, injection_of
from lightning_lora.ops.sharded import is_sharded, shard_group
from lightning_lora.strategies.shared.fsdp import gathering_dtype
from lightning_lora.strategies.shared.launched import check_keywords
from lightning_lora.strategies.shared.sharded import Sharded


class MegatronRanks(Sharded):
    """Mixin of the strategies for Trainer and Fabric: their options, the ranks as groups, placing a model on them."""

    strategy_name = "megatron_lora"
    splits_adapters = True

    def __init__(
        self,
        tensor_parallel_size: int | Literal["auto"] = "auto",
        plan: dict[str, str] | None = None,
        base_weights: str | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        **kwargs: Any,
    ) -> None:
        check_keywords(type(self), kwargs, self._lightning_base)
        super().__init__(**kwargs)
        megatron_core()
        check_contract()
        if tensor_parallel_size != "auto" and (not isinstance(tensor_parallel_size, int) or tensor_parallel_size < 1):
            raise ValueError(f"tensor_parallel_size={tensor_parallel_size!r} must be 'auto' or a positive integer")
        self.tensor_parallel_size = tensor_parallel_size
        self.plan = plan
        self.base_weights = base_weights
        self._process_group_backend = process_group_backend
        self._timeout = timeout
        self._checked_batch = False

    @property
    def data_parallel_rank(self) -> int:
        """Which part of the data this rank sees, the same for all ranks that share a model."""
        return int(parallel_state().get_data_parallel_rank())

    @property
    def data_parallel_group(self) -> Any:
        """The group of ranks that hold the same part of the model and see different data: sums and metrics go over it.

        ``None``, all ranks, before there are groups.
        """
        return None if self._device_mesh is None else parallel_state().get_data_parallel_group()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How a ``DistributedSampler`` splits the data: the same part for all ranks that share a model."""
        size = parallel_state().get_data_parallel_world_size()
        return {"num_replicas": size, "rank": self.data_parallel_rank}

    def setup_environment(self) -> None:
        """Find the other ranks."""
        super().setup_environment()  # type: ignore[misc]  # Lightning's
        if not torch.distributed.is_initialized():
            parallel_state().destroy_model_parallel()  # it may hold groups of ranks that have parted
        self._connect()
        if self.root_device.type not in ("cpu", "cuda"):
            raise ValueError(f"'megatron_lora' runs on CUDA devices and on CPU, not on {self.root_device.type!r}")
        if self.root_device.type == "cpu":
            megatron_cpu.install_for(self)

    def form_groups(self: Any, model: nn.Module | None) -> None:
        """Lay the ranks out in Megatron-core's groups; ``"auto"`` looks at the model for their size."""
        size = choose_size(self.tensor_parallel_size, self.world_size, model, self.root_device)
        state = parallel_state()
        if state.model_parallel_is_initialized() and state.get_tensor_model_parallel_world_size() != size:
            state.destroy_model_parallel()
        if not state.model_parallel_is_initialized():
            state.initialize_model_parallel(tensor_model_parallel_size=size, create_gloo_process_groups=False)
        self._device_mesh = mesh_of(state.get_tensor_model_parallel_group(), self.root_device.type)
        seed_ranks(self.device_mesh)
        replicas = self.world_size // size
        rank_zero_info(f"megatron_lora: {self.world_size} ranks = {replicas} data-parallel x {size} tensor-parallel")

    @override
    def place(self, model: nn.Module) -> None:
        """Split the model over the ranks in place, each part on its device. Called on all ranks."""
        if self.root_device.type == "cpu":
            megatron_cpu.install_for(*model.modules())
        keep_parts(model)  # also of what lies outside the adapted models: a teacher, a head of the user's
        for part in model.modules():
            if is_gpt(part):
                check_built(part, self.device_mesh.size())
        refuse_other_sizes(model, self.root_device)
        same_random_numbers(self.device_mesh)
        for root in injected_roots(model).values():
            if is_gpt(root):
                self._place_megatron(root)
            else:
                self._place_by_plan(root)
        move_to(model, self.root_device)
        make_equal(model, self.root_device, parallel_state().get_data_parallel_group())
        broadcast_replicated(model, self.root_device)
        guard_parts(model)
        for root in injected_roots(model).values():
            remember_fingerprint(root)
        count_batches_once(model)
        self._checked_batch = False

    def _place_by_plan(self, root: nn.Module) -> None:
        check_replicated(root)
        if not any(is_sharded(parameter) for parameter in root.parameters()):
            make_equal(root, self.root_device)
            counts = split(root, plan_of(root, self.plan), self.device_mesh)
            split_into = ", ".join(f"{kind} x{number}" for kind, number in counts.items())
            rank_zero_info(f"{type(root).__name__} split: {split_into}")
        elif (size := torch.distributed.get_world_size(shard_group(root.parameters()))) != self.device_mesh.size():
            raise ValueError(
                f"{type(root).__name__} is split over {size} ranks, from another run, and this one has "
                f"{self.device_mesh.size()} that share a model: build it anew and give ckpt_path= or init_from="
            )
        materialize(root, self.base_weights, self.root_device)

    def _place_megatron(self, root: Any) -> None:
        if self.base_weights is not None and injection_of(root).base_weights != self.base_weights:  # type: ignore[union-attr]  # it is adapted
            load_hf_weights(root, self.base_weights)
            injection_of(root).base_weights = self.base_weights  # type: ignore[union-attr]
        self._check_recomputed(root)
        let_gradients_through_recomputed(root)

    def _check_recomputed(self, root: Any) -> None:
        """Raise ``ValueError`` where Megatron-core would recompute, outside of autocast, in another dtype."""
        mixed, own = gathering_dtype(self.own_precision), next(root.parameters()).dtype
        if root.config.recompute_granularity == "full" and mixed not in (None, own):
            raise ValueError(
                f"recompute_granularity='full' recomputes outside of autocast, in the base's {own} and not in {mixed}: "
                "build the model in that dtype (params_dtype=...), or use precision='bf16-true'"
            )

    def teardown(self) -> None:
        """Leave the patches for CPU to the models that were placed."""
        super().teardown()  # type: ignore[misc]  # Lightning's
        megatron_cpu.release(self)

    @override
    def make_reducers(self, model: nn.Module) -> list[GradientReducer]:
        """Return what averages the gradients of a placed model: of whole factors, and of parts."""
        size = parallel_state().get_data_parallel_world_size()
        known: dict[str, Any] = {"names": names_of(model), "owners": owners(model)}
        whole = GradientReducer(model.parameters(), ranks_of=lambda parameter: replicas(parameter, size), **known)
        group = parallel_state().get_data_parallel_group()
        parts = GradientReducer(model.parameters(), group, parts=True, **known)
        return [whole, parts]


def choose_size(wanted: int | Literal["auto"], world_size: int, module: nn.Module | None, device: torch.device) -> int:
    """Return the number of ranks that share a model.

    Raises:
        ValueError: it does not divide the ranks, or no size does what ``"auto"`` asks for.
    """
    if wanted != "auto":
        if world_size % wanted:
            raise ValueError(f"tensor_parallel_size={wanted} does not divide the {world_size} ranks")
        return wanted
    if world_size == 1:
        return 1
    assert module is not None
    heads = heads_of(module)
    sizes = [size for size in range(2, world_size + 1) if world_size % size == 0]
    fitting = [size for size in sizes if all(number % size == 0 for number in heads)]
    if not fitting:
        raise ValueError(
            f"no number of tensor-parallel ranks divides both the {world_size} ranks and the model's "
            f"{' and '.join(map(str, heads))} heads: run on another number of devices, or use strategy='fsdp_lora'"
        )
    half = torch.cuda.get_device_properties(device).total_memory / 2 if device.type == "cuda" else float("inf")
    base = sum(parameter.nbytes for parameter in module.parameters())  # nothing is frozen yet
    return next((size for size in fitting if base / size <= half), fitting[-1])


def replicas(parameter: Tensor, data_parallel_size: int) -> int:
    """Return over how many ranks the sum of a whole tensor's gradients is to be divided.

    Where each tensor-parallel rank has an addend (``lora_tp_sum``) it is their sum, averaged over data alone.
    """
    if getattr(parameter, "lora_tp_sum", False):
        return data_parallel_size
    return torch.distributed.get_world_size()


def same_random_numbers(mesh: DeviceMesh) -> None:
    """Give the ranks that share a model the random state of their first, so that their dropout is one."""
    group = mesh.get_group()
    first = torch.distributed.get_global_rank(group, 0)
    state = torch.get_rng_state().to(mesh.device_type)
    torch.distributed.broadcast(state, first, group=group)
    torch.set_rng_state(state.cpu())
    if mesh.device_type == "cuda":
        state = torch.cuda.get_rng_state().cuda()
        torch.distributed.broadcast(state, first, group=group)
        torch.cuda.set_rng_state(state.cpu())


def seed_ranks(mesh: DeviceMesh) -> None:
    """Let ranks that share a model draw the same, and differently where Megatron-core wants them to differ.

    Its own streams start from the seed of ``seed_everything``, or from the first rank's.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    same_random_numbers(mesh)
    seed = torch.tensor(int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**31)), device=mesh.device_type)
    torch.distributed.broadcast(seed, 0)
    with torch.random.fork_rng():
        model_parallel_cuda_manual_seed(int(seed), force_reset_rng=True)


def check_same_batch(batch: Any, mesh: DeviceMesh) -> None:
    """Raise ``ValueError`` where ranks that share a model were given different data."""
    sums = [leaf.double().sum().nan_to_num() + leaf.numel() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not sums or mesh.size() == 1:
        return
    if any(differ(torch.stack([one.to(mesh.device_type) for one in sums]), mesh.get_group())):
        raise ValueError(
            "ranks that share a model were given different batches: split the data by the strategy's "
            "distributed_sampler_kwargs (Lightning's own sampler does), not by the global rank"
        )


def check_first_batch(model: nn.Module, mesh: DeviceMesh) -> None:
    """Run :func:`check_same_batch` on what the model's first forward for training is given."""

    def check(_: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            check_same_batch((args, kwargs), mesh)
            handle.remove()

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
