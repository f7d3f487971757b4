"""The contract with other packages: each private name that the library uses is there, and does what it is used for."""

import ast
import inspect
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.fabric
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.utils.prune
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.wrappers import _FabricModule
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification

from lightning_lora.compat import bitsandbytes, distributed, megatron, transformers
from lightning_lora.compat import lightning as of_lightning
from lightning_lora.compat import torch as of_torch
from lightning_lora.compat.lookup import private
from lightning_lora.megatron.core import megatron_core
from tests.models import checkpoint_activations

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "lightning_lora"
ROOMS = (bitsandbytes, distributed, megatron, transformers, of_lightning, of_torch)
# nn.Module's dictionaries and extension points; what namedtuples document; os._exit; ends of names of ours
PUBLIC = {
    "_parameters",
    "_modules",
    "_buffers",
    "_apply",
    "_load_from_state_dict",
    "_save_to_state_dict",
    "_make",
    "_replace",
    "_exit",
    "_bias",
}
OVERRIDDEN = {  # methods of Lightning that a class of ours replaces, by the class that must have them
    "_setup_model": pl.strategies.Strategy,
    "_configure_launcher": pl.strategies.Strategy,
    "_sigterm_notifier_fn": of_lightning.signal_connector_class(),
    "_slurm_sigusr_handler_fn": of_lightning.signal_connector_class(),
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.strip("_") != "" and name not in PUBLIC


def defined_names(trees: list[ast.Module]) -> set[str]:
    """Return what the library itself defines: functions, classes, variables, and attributes of ``self``."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return names


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_uses(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """Yield line and name of each private attribute, import and string in a file that ``own`` lacks."""
    strategies = (pl.strategies.SingleDeviceStrategy("cpu"), lightning.fabric.strategies.SingleDeviceStrategy("cpu"))
    kept_by_lightning = {name for strategy in strategies for name in vars(strategy)}
    others = {*dir(Tensor), *dir(pl.LightningModule()), *kept_by_lightning}
    in_f_strings = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            foreign = kept_by_lightning if is_self(node.value) else others
            names = [] if node.attr in own - foreign else [node.attr]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lightning_lora"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in in_f_strings:
            names = [node.value] if node.value.isidentifier() and node.value not in own else []
        else:
            continue
        yield from ((node.lineno, name) for name in names if is_private(name))


def test_no_file_outside_compat_uses_a_private_name_of_another_package() -> None:
    # the written forms of forwards in transformers are compared, and never run
    paths = [p for p in LIBRARY.rglob("*.py") if "compat" not in p.parts and not p.stem.endswith("forms")]
    trees = {path: ast.parse(path.read_text()) for path in paths}
    own = defined_names(list(trees.values()))
    found = [f"{path}:{line} {name}" for path, tree in trees.items() for line, name in private_uses(tree, own)]
    assert found == []


def test_a_private_name_is_found_in_each_way_of_writing_it() -> None:
    source = """
from torch._C import a
from torch import _b
import torch._c
torch._d
getattr(torch, "_e")
self._launcher = None
self._own = self._own
"""
    assert [n for _, n in private_uses(ast.parse(source), {"_own", "_launcher"})] == [
        "_C", "_b", "_c", "_d", "_launcher", "_e",
    ]  # fmt: skip


def test_no_private_name_is_looked_up_by_importing_the_library() -> None:
    script = """
import functools, importlib, sys, types
package = sys.modules["lightning_lora"] = types.ModuleType("lightning_lora")
package.__path__ = ["lightning_lora"]
called = set()
def noted(function, *arguments):
    called.add(function.__name__)
    return function(*arguments)
for name in ("distributed", "lightning", "megatron", "torch", "transformers"):
    room = importlib.import_module(f"lightning_lora.compat.{name}")
    for key, function in [*vars(room).items()]:
        if isinstance(function, types.FunctionType) and function.__module__ == room.__name__:
            setattr(room, key, functools.partial(noted, function))
called.clear()
del sys.modules["lightning_lora"]
import lightning_lora
print(lightning_lora.LoRAConfig.__name__, *called)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    # what reads a file is wrapped at import
    places = {"place_of_load_state", "place_of_restore_model"}
    assert set(result.stdout.split()) - {"_place", "_lightning"} == {"LoRAConfig", *places}


def test_every_function_of_compat_is_tried_here() -> None:
    own = {node.attr for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Attribute)}
    functions = [n for room in ROOMS for n, f in vars(room).items() if inspect.isfunction(f) and n[0] != "_"]
    assert set(functions) - own - {"missing", "private"} == set()


def test_a_missing_name_is_an_error_with_the_package_and_its_version() -> None:
    with pytest.raises(ImportError, match=rf"uses torch.nn._nothing, which torch {torch.__version__[:3]}.* lacks"):
        private("torch", torch.nn, "_nothing")
    with pytest.raises(ImportError, match=r"uses lightning._nothing.name, which lightning .* lacks"):
        private("lightning", "lightning._nothing", "name")


def test_methods_that_classes_of_the_library_replace_are_still_there() -> None:
    assert all(callable(getattr(cls, name)) for name, cls in OVERRIDDEN.items())
    assert callable(lightning.fabric.strategies.ParallelStrategy._configure_launcher)


# torch


def test_transforms_and_forward_mode_are_noticed() -> None:
    seen = []
    torch.func.vmap(lambda x: seen.append((of_torch.has_transforms(), of_torch.is_transformed())) or x)(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        seen.append((of_torch.has_transforms(), of_torch.is_transformed()))
    assert seen == [(True, True), (False, True)]
    assert not of_torch.has_transforms()
    assert not of_torch.is_transformed()


def test_what_is_computed_untraced_is_a_constant_of_the_trace() -> None:
    def double(x: Tensor) -> Tensor:
        with of_torch.untraced():
            two = torch.ones(2).sum()
        return x * two

    traced = torch.jit.trace(double, (torch.ones(3),))
    assert "aten::sum" not in str(traced.graph)
    assert traced(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]


def test_bitsandbytes_undoes_its_order_for_cpus_with_bfloat16_instructions() -> None:
    layers = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").nn
    with torch.compiler.set_stance("force_eager"):
        layer = layers.Linear4bit(128, 64, quant_type="nf4", compress_statistics=False).to("cpu").eval()
        codes = layer.weight.data.clone()
        functional = sys.modules["bitsandbytes.functional"]
        layer.weight.data, state = functional._convert_weight_packed_for_cpu(
            layer.weight.data, layer.weight.quant_state
        )
        assert state.packing_format_for_cpu
        bitsandbytes.unpack_from_cpu_format(layer.weight, state)
    assert torch.equal(layer.weight.data.view(-1), codes.view(-1))
    assert not layer.weight.quant_state.packing_format_for_cpu


def test_plain_tensors_lifts_subclasses() -> None:
    class Loud(Tensor):
        pass

    loud = torch.ones(2).as_subclass(Loud)
    with of_torch.plain_tensors():
        assert type(loud.detach()) is Tensor
    assert type(loud.detach()) is Loud


def test_tensors_report_and_reshape() -> None:
    x = torch.zeros(2, 3)
    before = of_torch.version_of(x)
    x.add_(1)
    assert of_torch.version_of(x) == before + 1
    y = of_torch.unsafe_view(x.requires_grad_() * 2, [3, 2])
    assert y.shape == (3, 2)
    assert y._base is None
    assert of_torch.tree_leaves({"a": [1, (2, None)]}) == [1, 2, None]


def test_onednn_multiplies() -> None:
    x, weight, bias = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)
    torch.testing.assert_close(of_torch.onednn_linear(x, weight, bias), nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(of_torch.onednn_linear(x[:, :4], weight.t(), None), x[:, :4] @ weight)


@pytest.mark.parametrize("is_there", [True, False])
def test_operations_on_many_tensors_equal_their_loops(is_there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_there:
        for name in ("_foreach_norm", "_foreach_div_", "_foreach_mul_", "_foreach_copy_"):
            monkeypatch.delattr(torch, name)
    tensors = [torch.ones(4), torch.full((1,), 3.0)]
    assert [float(norm) for norm in of_torch.foreach_norm(tensors, 2.0, torch.float32)] == [2, 3]
    of_torch.foreach_div_(tensors, [1.0, 3.0])
    assert tensors[1].item() == 1
    of_torch.foreach_mul_(tensors, torch.tensor(2.0))
    assert (tensors[0][0].item(), tensors[1].item()) == (2, 2)
    of_torch.foreach_copy_(tensors, [torch.zeros(4), torch.ones(1)])
    assert tensors[0].sum() == 0
    assert tensors[1].item() == 1


def test_schedules_follow_the_groups_of_an_optimizer() -> None:
    def schedules(*rates: float) -> torch.optim.lr_scheduler.LRScheduler:
        optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": rate} for rate in rates])
        inner = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10) for _ in range(2)]
        return torch.optim.lr_scheduler.SequentialLR(optimizer, inner, [5])

    theirs, ours = schedules(1.0, 2.0, 3.0), schedules(8.0, 3.0)
    state = theirs.state_dict()
    of_torch.move_groups(state, [None, 2], ours.state_dict())
    assert state["_last_lr"] == [8.0, 3.0]
    assert [inner["base_lrs"] for inner in state["_schedulers"]] == [[8.0, 3.0]] * 2


def test_hooks_of_a_module_are_found() -> None:
    layer = nn.Linear(2, 2)
    assert not of_torch.has_hooks(layer)
    assert of_torch.hooks_of(layer) == []
    layer.register_forward_hook(print)
    layer.register_forward_pre_hook(repr)
    layer.register_full_backward_hook(min)
    layer.register_full_backward_pre_hook(max)
    assert set(of_torch.hooks_of(layer)) == {print, repr, min, max}
    assert of_torch.has_hooks(layer)
    assert [*of_torch.forward_hooks(layer).values()] == [print]
    assert [*of_torch.forward_pre_hooks(layer).values()] == [repr]
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert of_torch.has_global_hooks()
    handle.remove()
    assert not of_torch.has_global_hooks()


def test_a_pruned_parameter_is_kept_under_a_name_that_is_known() -> None:
    layer = nn.Linear(2, 2, bias=False)
    torch.nn.utils.prune.identity(layer, "weight")
    assert [of_torch.before_pruning(name) for name, _ in layer.named_parameters()] == ["weight"]
    assert of_torch.before_pruning("bias") == "bias"


def test_compiled_modules_are_found() -> None:
    layer = nn.Linear(2, 2)
    assert not of_torch.is_compiled(layer)
    assert of_torch.compiled_module(layer) is None
    wrapped = torch.compile(layer, backend="eager")
    assert of_torch.compiled_module(wrapped) is layer
    assert all(of_torch.COMPILED in name for name, _ in wrapped.named_parameters())
    layer.compile(backend="eager")
    assert of_torch.is_compiled(layer)


def test_a_hook_of_load_state_dict_is_removed() -> None:
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)

    layer = nn.Linear(2, 2)
    layer.register_load_state_dict_pre_hook(hook)
    layer.load_state_dict(layer.state_dict())
    of_torch.remove_load_hook(layer, hook)
    layer.load_state_dict(layer.state_dict())
    assert calls == [1]


def test_layers_give_what_their_adapters_read() -> None:
    norm = nn.BatchNorm1d(3)
    norm.register_buffer("own", torch.ones(1), persistent=False)
    assert of_torch.non_persistent_buffers(norm) == {"own"}
    assert all(isinstance(one, of_torch.batch_norm_class()) for one in (norm, nn.SyncBatchNorm(3)))
    layer, x = nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular", bias=False), torch.randn(1, 2, 5)
    assert torch.equal(of_torch.convolve(layer, x, layer.weight), layer(x))
    assert [*of_torch.padding_on_both_sides(layer)] == [1, 1]
    recurrent = nn.GRU(2, 2)
    recurrent.weight_ih_l0 = nn.Parameter(torch.zeros(6, 2))
    recurrent._flat_weights.clear()
    of_torch.collect_weights(recurrent)
    assert recurrent(torch.ones(1, 2))[0].shape == (1, 2)


def test_hooks_of_an_optimizer_are_found() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
    for register in (
        optimizer.register_step_pre_hook, optimizer.register_step_post_hook, optimizer.register_state_dict_pre_hook,
        optimizer.register_state_dict_post_hook, optimizer.register_load_state_dict_pre_hook,
        optimizer.register_load_state_dict_post_hook,
    ):  # fmt: skip
        register(print)
    holders = [value for name, value in vars(optimizer).items() if of_torch.is_optimizer_hook(name)]
    assert sum(print in holder.values() for holder in holders) == 6


def test_the_frame_of_a_checkpoint_is_given_what_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    frame, functions = of_torch.checkpoint_frame(), []
    former = frame.__init__
    monkeypatch.setattr(
        frame, "__init__", lambda self, function, *a, **k: functions.append(function) or former(self, function, *a, **k)
    )
    checkpoint(nn.Linear(2, 2), torch.ones(1, 2), use_reentrant=False)
    assert len(functions) == 1
    assert callable(functions[0])


def test_both_ways_of_unscaling_go_through_one_method() -> None:
    parameter, calls = nn.Parameter(torch.ones(1)), []
    optimizer = torch.optim.SGD([parameter], 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    unscale = of_torch.unscaling_of(scaler)
    vars(scaler)[of_torch.UNSCALE] = lambda *arguments: calls.append(1) or unscale(scaler, *arguments)
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    assert parameter.grad.item() == 1
    assert calls == [1]
    assert of_torch.UNSCALE in inspect.getsource(type(scaler)._check_inf_per_device)
    with pytest.raises(ValueError, match="not served with int"):
        of_torch.unscaling_of(1)


# torch.distributed


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_the_store_of_the_process_group_is_shared() -> None:
    distributed.default_store().set("key", "value")
    assert distributed.default_store().get("key") == b"value"


@pytest.mark.filterwarnings("ignore:DTensor random operators")  # torch 2.6 says so on CPU
@pytest.mark.usefixtures("one_rank")
def test_parts_of_a_tensor_are_described() -> None:
    mesh = init_device_mesh("cpu", (1,))
    tensor = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
    assert distributed.local_box(tensor) == ((4, 2), (0, 0))
    striped = distributed.striped_shard(0, 2)
    assert distributed.is_striped(striped)
    assert not distributed.is_striped(Shard(0))
    assert (striped.dim, striped.split_factor) == (0, 2)


@pytest.mark.usefixtures("one_rank")
def test_ddp_gives_all_ranks_the_same_buffers() -> None:
    model = DistributedDataParallel(nn.BatchNorm1d(2))
    distributed.sync_buffers(model)
    assert model.module.running_var.tolist() == [1, 1]


def fully_sharded() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@pytest.mark.usefixtures("one_rank")
def test_the_parameters_that_fsdp_gathers_are_found_and_forgotten() -> None:
    model = fully_sharded()
    assert distributed.is_fsdp(model)
    assert not distributed.is_fsdp(model[1])
    assert isinstance(model, FSDPModule)
    if "ignored_params" not in inspect.signature(fully_shard).parameters:  # such a torch is refused by the strategy
        with pytest.raises(ImportError, match="_fsdp_param_groups, which torch"):
            distributed.fsdp_groups(model)
        return
    distributed.make_fsdp_root(model)
    [group] = distributed.fsdp_groups(model)
    weight, bias = group.fsdp_params
    assert distributed.gathered_parameter(weight) is None
    distributed.gather_once(model)
    gathered = distributed.gathered_parameter(weight)
    assert gathered is not None
    assert gathered.shape == (2, 3)
    assert model(torch.ones(1, 2)).shape == (1, 2)
    model.reshard()
    distributed.set_parameters(group, [bias])
    assert distributed.fsdp_groups(model)[0].fsdp_params == [bias]
    distributed.set_parameters(group, [])
    distributed.fsdp_groups(model).remove(group)
    assert distributed.fsdp_groups(model) == []


# Lightning


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # by torch, of what Lightning calls
@pytest.mark.usefixtures("one_rank")
def test_collectives_of_lightning_run() -> None:
    of_lightning.connect(LightningEnvironment(), "gloo")  # a group is there already, and is kept
    assert of_lightning.reduce_tensor(torch.ones(1), None, "mean").item() == 1
    assert of_lightning.gather_tensor(torch.ones(1), None, False).shape == (1, 1)


def test_strategies_are_read_and_given_parts() -> None:
    for kind in (pl.strategies, lightning.fabric.strategies):
        launcher = of_lightning.subprocess_launcher(kind.ParallelStrategy)
        assert launcher.__module__.startswith(kind.__name__)
        strategy = kind.DDPStrategy(bucket_cap_mb=7)
        assert of_lightning.ddp_options(strategy)["bucket_cap_mb"] == 7
        made = launcher(LightningEnvironment(), 1, 1)
        of_lightning.set_launcher(strategy, made)
        assert strategy.launcher is made
        assert not of_lightning.is_forking(made)
    assert of_lightning.has_communication_hook(pl.strategies.DDPStrategy(ddp_comm_hook=print))
    assert not of_lightning.has_communication_hook(pl.strategies.DDPStrategy())
    spawning = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False)
    assert of_lightning.is_forking(spawning.strategy.launcher)
    module = BoringModel()
    of_lightning.set_device_mesh(module, "mesh")
    assert module.device_mesh == "mesh"


def test_fabric_is_unwrapped_and_asks_for_accumulation() -> None:
    fabric, asked = Fabric(accelerator="cpu", strategy="ddp", devices=1), []
    layer = nn.Linear(1, 1)
    wrapped = _FabricModule(layer, fabric.strategy)
    assert of_lightning.unwrapped([wrapped])[0] is layer
    assert fabric.strategy is fabric._strategy

    class Control:
        def no_backward_sync(self, module: nn.Module, enabled: bool) -> Any:
            asked.append(enabled)
            return torch.no_grad()

    of_lightning.set_backward_sync(fabric.strategy, Control())
    with fabric.no_backward_sync(wrapped):
        pass
    assert asked == [True]


def test_samplers_are_told_the_epoch() -> None:
    sampler = torch.utils.data.DistributedSampler(range(4), num_replicas=2, rank=0)
    of_lightning.set_epoch(torch.utils.data.DataLoader(range(4), sampler=sampler), 3)
    assert sampler.epoch == 3


class Asking(pl.Callback):
    """Asks a running Trainer all that the strategies ask, after its first batch of three."""

    found: dict[str, Any]

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        loop = trainer.fit_loop.epoch_loop
        if index != 0:
            return
        stepped = loop._batches_that_stepped
        of_lightning.uncount_batch(loop)
        self.found = {
            "uncounted": stepped - loop._batches_that_stepped,
            "accumulates": of_lightning.accumulates(loop),
            "validates": of_lightning.validates_next(loop, trainer.fit_loop._data_fetcher),
            "ends": of_lightning.has_no_more_batches(loop),
            "loaders": of_lightning.train_loader(trainer).flattened,
            "positions": of_lightning.loader_states(of_lightning.train_loader(trainer)),
            "checkpoint": of_lightning.dump_checkpoint(trainer, False),
            "loaded": of_lightning.loaded_checkpoint(trainer._checkpoint_connector),
        }


def test_a_running_trainer_answers(tmp_path: Path) -> None:
    asking = Asking()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=3, limit_val_batches=1, callbacks=[asking],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    connector = of_lightning.signal_connector_class()(trainer)
    of_lightning.set_signal_connector(trainer, connector)
    of_lightning.silence_sigterm_broadcast(trainer.fit_loop.epoch_loop)
    trainer.fit(BoringModel())
    found = asking.found
    assert found["uncounted"] == 1
    assert not found["accumulates"]
    assert not found["validates"]
    assert not found["ends"]
    assert len(found["loaders"]) == 1
    assert found["positions"] == []
    assert found["loaded"] == {}
    saved = found["checkpoint"]["loops"]["fit_loop"]
    before = saved["epoch_loop.state_dict"]["_batches_that_stepped"]
    of_lightning.uncount_saved_batch(saved)
    assert saved["epoch_loop.state_dict"]["_batches_that_stepped"] == before - 1
    assert of_lightning.has_no_more_batches(trainer.fit_loop.epoch_loop)
    evaluations = (trainer.validate_loop, trainer.test_loop)
    assert all(callable(getattr(loop, of_lightning.outputs_method(loop))) for loop in evaluations)
    assert of_lightning.outputs_method(trainer.predict_loop) is None
    trainer.fit_loop.restarting = True
    of_lightning.clear_restarting(trainer.fit_loop)
    assert trainer.fit_loop.restarting is False
    assert "_broadcast_sigterm_tensor" in vars(trainer.fit_loop.epoch_loop)


def test_slurm_is_asked_to_requeue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setattr(
        "lightning.pytorch.trainer.connectors.signal_connector.call", lambda c, **_: asked.append(c) or 0
    )
    trainer = SimpleNamespace(
        loggers=[], is_global_zero=True, save_checkpoint=asked.append, default_root_dir=str(tmp_path), logger=None
    )
    trainer._checkpoint_connector = SimpleNamespace(hpc_save_path=lambda _: "hpc_ckpt_1.ckpt")
    of_lightning.requeue(of_lightning.signal_connector_class()(trainer), 12)
    assert "hpc_ckpt" in str(asked[0])
    assert asked[1] == ["scontrol", "requeue", "7"]


def test_places_that_are_wrapped_are_called() -> None:
    for place in (
        of_lightning.place_of_load_state(),
        of_lightning.place_of_restore_model(),
    ):  # fmt: skip
        assert callable(getattr(*place))
    trainers, fabrics = of_lightning.connectors()
    assert isinstance(pl.Trainer(accelerator="cpu", logger=False)._accelerator_connector, trainers)
    assert isinstance(Fabric(accelerator="cpu")._connector, fabrics)
    file, keys = io.BytesIO(), []
    module = BoringModel()
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": pl.__version__}, file)
    file.seek(0)
    owner, name = of_lightning.place_of_load_state()
    former = getattr(owner, name)
    setattr(owner, name, lambda cls, *a, **k: keys.append(cls) or former(cls, *a, **k))
    try:
        BoringModel.load_from_checkpoint(file)
    finally:
        setattr(owner, name, former)
    assert keys == [BoringModel]


def test_instantiators_are_a_set_or_all() -> None:
    allowed = of_lightning.allowed_instantiators()
    assert allowed is None or "lightning.pytorch.cli.instantiate_module" in allowed
    assert of_lightning.INSTANTIATOR in inspect.getsource(of_lightning.place_of_load_state()[0])


def test_a_command_line_names_its_callbacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lightning.pytorch.cli import LightningCLI

    owner, name = of_lightning.place_of_cli_optimizer()
    assert owner is LightningCLI
    assert callable(getattr(owner, name))
    monkeypatch.setattr(sys, "argv", ["cli"])
    stop = "lightning.pytorch.callbacks.LearningRateMonitor"
    options = [f"--trainer.callbacks={stop}", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
    cli = LightningCLI(
        BoringModel,
        run=False,
        args=options,
        seed_everything_default=1,
        trainer_defaults={"callbacks": [asked := Asking()]},
    )
    names = [type(callback).__name__ for callback in of_lightning.cli_callbacks(cli)]
    assert "LearningRateMonitor" in names
    assert asked in of_lightning.cli_callbacks(cli)


@pytest.mark.parametrize("names_a_class", [True, False])
def test_a_command_line_says_the_settings_of_its_optimizer(
    monkeypatch: pytest.MonkeyPatch, names_a_class: bool
) -> None:
    from lightning.pytorch.cli import LightningCLI

    class Command(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            if not names_a_class:
                parser.add_optimizer_args(torch.optim.AdamW)

    monkeypatch.setattr(sys, "argv", ["cli"])
    options = [
        *(["--optimizer=torch.optim.AdamW"] if names_a_class else []),
        "--optimizer.lr=0.25",
        "--trainer.accelerator=cpu",
    ]
    with pytest.warns(match="will be overridden by"):
        cli = Command(BoringModel, run=False, args=options, seed_everything_default=1)
    settings = of_lightning.cli_optimizer_settings(cli, None)
    assert (settings["lr"], settings["weight_decay"]) == (0.25, 0.01)


# transformers and Megatron-core


def test_a_transformers_model_says_what_is_read() -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    config._commit_hash, config.name_or_path = "0a1b", "somebody/base"
    model = BertForSequenceClassification(config)
    assert transformers.revision(model.config) == "0a1b"
    assert model.config.name_or_path == "somebody/base"
    assert transformers.was_made(model.bert.pooler.dense)
    assert not transformers.was_made(nn.Linear(1, 1))
    new = nn.Linear(8, 8)
    transformers.draw_weights(model, new)
    assert new.bias.abs().sum() == 0
    assert "BertLayer" in {name for part in model.modules() for name in transformers.block_classes(part)}
    checkpoint_activations(model)
    assert any(transformers.checkpoint_function(part) is not None for part in model.modules())
    assert not transformers.is_expert_parallel(model)


def test_experts_of_transformers_say_how_they_compute() -> None:
    from transformers import LlamaForCausalLM, Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    assert transformers.tensor_parallel_plan(LlamaForCausalLM.__new__(LlamaForCausalLM)).keys() == {"lm_head"}
    config = Qwen3MoeConfig(hidden_size=8, moe_intermediate_size=8, num_experts=2)
    assert transformers.experts_implementation(config) == "eager"
    assert transformers.experts_implementation(SimpleNamespace(_experts_implementation="grouped_mm")) == "grouped_mm"
    experts = Qwen3MoeExperts(config)
    assert transformers.experts_gate(experts)(torch.ones(1, 4)).shape == (1, 2)
    assert transformers.experts_have_gate(experts)


def test_megatron_core_has_what_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    megatron_core()  # takes back what a bare import lets safe loads build
    from megatron.core.tensor_parallel import random
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    megatron.check_linear_product(ColumnParallelLinear)
    megatron.check_linear_product(RowParallelLinear)
    with pytest.raises(ImportError, match="Linear of this megatron-core has no method _forward_impl"):
        megatron.check_linear_product(nn.Linear)
    dispatcher = type("Dispatcher", (MoEAlltoAllTokenDispatcher,), {})
    megatron.skip_copies_to_host(dispatcher)
    assert dispatcher._maybe_dtoh_and_synchronize(None, "before", 3) == 3
    for name in ("_get_cuda_rng_state", "_set_cuda_rng_state"):
        monkeypatch.setattr(random, name, getattr(random, name))  # put back afterwards
    megatron.set_random_state_functions(lambda *_, **__: "state", print)
    assert random._get_cuda_rng_state() == "state"
    assert random._set_cuda_rng_state is print
