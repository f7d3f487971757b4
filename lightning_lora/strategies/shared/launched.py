"""Launch one process per device and connect them, for the sharded strategies of Trainer and Fabric."""

import atexit
import difflib
import inspect
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.seed import reset_seed
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lightning_lora.compat.lightning import connect, gather_tensor, reduce_tensor, set_launcher, subprocess_launcher
from lightning_lora.distributed.rendezvous import store_of_this_attempt

T = TypeVar("T")


class Launched:
    """Mixin for a parallel strategy of either kind; it stands before Lightning's class.

    Devices are looked up by the local rank in one place, ``root_device``, which another launcher may answer itself.
    """

    _lightning_base: type  # Trainer's or Fabric's ParallelStrategy
    _num_nodes: int = 1
    _device_mesh: DeviceMesh | None = None
    data_parallel_group: Any = None  # one rank for each part of the data; ``None`` is all ranks
    _process_group_backend: str | None = None
    _timeout: timedelta | None = default_pg_timeout

    @property
    def device_mesh(self) -> DeviceMesh:
        """The ranks by what they share out."""
        if self._device_mesh is None:
            raise RuntimeError("there is no device mesh before the processes have found each other (setup_environment)")
        return self._device_mesh

    @property
    def root_device(self: Any) -> torch.device:
        """The device of this process."""
        device: torch.device = self.parallel_devices[self.local_rank]
        return device

    @property
    def num_processes(self: Any) -> int:
        """Ranks on this node."""
        return len(self.parallel_devices or [])

    @property
    def num_nodes(self) -> int:
        """Nodes of the run."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def distributed_sampler_kwargs(self: Any) -> dict[str, Any]:
        """How a ``DistributedSampler`` splits the data."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def process_group_backend(self) -> str | None:
        """Name of the backend of collectives."""
        return self._process_group_backend

    def _configure_launcher(self: Any) -> None:
        if not self.cluster_environment.creates_processes_externally:
            launcher = subprocess_launcher(self._lightning_base)
            set_launcher(self, launcher(self.cluster_environment, self.num_processes, self.num_nodes))

    def _set_world_ranks(self: Any) -> None:
        """Tell the cluster environment which rank this process is, unless it knows better."""
        environment = self.cluster_environment
        if environment is not None:
            environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            environment.set_world_size(self.num_nodes * self.num_processes)
        vars(rank_zero_only)["rank"] = self.global_rank

    def _connect(self: Any) -> None:
        """Bring this process into the group of all ranks."""
        reset_seed()
        self._set_world_ranks()
        device = self.root_device
        backend = self._process_group_backend or _default_backend(device)
        self._process_group_backend = backend
        settings: dict[str, Any] = {"timeout": self._timeout, "device_id": device if device.type != "cpu" else None}
        if not torch.distributed.is_initialized():
            settings |= store_of_this_attempt(self.global_rank, self.world_size, self._timeout)
            atexit.register(_disconnect)  # left to the interpreter's end, gloo's threads now and then abort the process
        connect(self.cluster_environment, backend, **settings)

    def barrier(self: Any, *_: Any, **__: Any) -> None:
        """Wait until all ranks are here."""
        if torch.distributed.is_initialized():
            on_gpu = torch.distributed.get_backend() == "nccl"
            torch.distributed.barrier(device_ids=[self.root_device.index] if on_gpu else None)

    def reduced(self, tensor: Any, group: Any, reduce_op: Any) -> Any:
        """Return a tensor reduced over ``group``, or over all data-parallel ranks; other values as they are."""
        if not isinstance(tensor, Tensor):
            return tensor
        return reduce_tensor(tensor, self._data_group(group), reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return the tensors of ``group``, or of all data-parallel ranks, stacked along a new first dimension."""
        return gather_tensor(tensor, self._data_group(group), sync_grads)

    def _data_group(self, group: Any) -> Any:
        """Return ``group``, or the data-parallel group where the user gave none: Lightning passes all ranks then."""
        if group is None or group is torch.distributed.group.WORLD:
            return self.data_parallel_group
        return group

    def reduce_boolean_decision(self: Any, decision: bool, all: bool = True) -> bool:
        """Return True if all ranks decide True, or with ``all=False`` any of them. Called on all ranks."""
        if not torch.distributed.is_initialized():
            return decision
        votes = torch.tensor(int(decision), device=self.root_device)
        torch.distributed.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes)

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Return rank ``src``'s object."""
        if not torch.distributed.is_initialized():
            return obj
        objects = [obj]
        torch.distributed.broadcast_object_list(objects, src)
        return objects[0]


def _default_backend(device: torch.device) -> str:
    backends: dict[str, str] = torch.distributed.Backend.default_device_backend_map
    return backends.get(device.type, "gloo")


def _disconnect() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_keywords(strategy: type[Any], keywords: Mapping[str, Any], base: type[Any]) -> None:
    """Raise ``TypeError`` for a keyword that neither the strategy nor Lightning's base of it knows."""
    known = inspect.signature(base.__init__).parameters
    own = [name for name in inspect.signature(strategy.__init__).parameters if name not in ("self", "kwargs")]
    for name in keywords:
        if name not in known:
            near = difflib.get_close_matches(name, own, n=2, cutoff=0.5) or own
            raise TypeError(f"{strategy.__name__} has no option {name!r}; nearest: {', '.join(near)}")
