"""Split a model over tensor-parallel ranks by its plan, in place: names and the model's code stay as they are."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_lora.layers import LoRALayer
from lightning_lora.layers.class_swap import lora_class, swap_class
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.layers.host import Host, adapters_of, follow_base
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.quantized import QuantizedLinear
from lightning_lora.layers.split import SplitLinear
from lightning_lora.layers.stored import stored_form
from lightning_lora.layers.token_rows import TokenRows
from lightning_lora.megatron.packed_parts import check_blocks, keep_packed_part
from lightning_lora.megatron.parallel_layers import (
    ColumnParallelLinear,
    LoRAParallelLinear,
    QuantizedParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from lightning_lora.megatron.parts import keep_part
from lightning_lora.megatron.tp_plan import check_heads, chosen_layers, stays_whole
from lightning_lora.model.families import is_pretrained
from lightning_lora.model.names import clean_name
from lightning_lora.model.state import require_injection


def split(root: nn.Module, plan: Mapping[str, str], mesh: DeviceMesh) -> dict[str, int]:
    """Split the layers that ``plan`` names over ``mesh`` in place, adapters with them. Called on all its ranks.

    Every rank must hold the same whole model (or have its base on meta). Communicates nothing.

    Returns:
        How many layers of each kind were split.

    Raises:
        ValueError: a name is unknown, a word is not served, or a size cannot be divided. Nothing is changed then.
    """
    modules = {clean_name(name): module for name, module in root.named_modules()}
    chosen = chosen_layers(modules, plan)
    ranks = mesh.size()
    chosen = {name: how for name, how in chosen.items() if not stays_whole(name, modules[name], how, ranks)}
    check_heads(root, ranks)
    for name, (kind, _) in chosen.items():
        _check_layer(name, modules[name], kind, ranks)
    head, table = _tied_table(root, chosen)
    chosen |= {name: ("column", True) for name in chosen if modules[name] is head}
    counts: dict[str, int] = {}
    for name, (kind, is_whole) in chosen.items():
        if kind == "summed":
            for parameter in modules[name].parameters():  # it works on this rank's heads: their gradients are addends
                parameter.lora_tp_sum = True
        else:
            _split_linear(modules[name], kind, is_whole, mesh)
        counts[kind] = counts.get(kind, 0) + 1
    if head is not None and table is not None:
        table._parameters["weight"] = head._parameters["weight"]
    elif (table := _input_table(root, ranks)) is not None:
        keep_part(table, "weight", mesh, 0)
    if table is not None:
        table.__dict__.update(tp_group=mesh.get_group())
        swap_class(table, VocabParallelEmbedding)
        counts["vocabulary"] = 1
    return counts


def _check_layer(name: str, layer: nn.Module, kind: str, ranks: int) -> None:
    if kind == "summed":
        return
    if not isinstance(layer, nn.Linear) or isinstance(layer, SplitLinear):
        raise ValueError(f"the plan names {name!r}, a {type(layer).__name__}; split are linear layers")
    for adapter in adapters_of(layer):
        if type(adapter).__bases__[0] is LoRALinear:
            continue
        raise ValueError(
            f"{name!r} is adapted by {type(adapter).__bases__[0].__name__}, which tensor parallelism does not serve "
            "(DoRA, lora_bias, PiSSA, OLoRA, token rows, a weight that is read): leave the option or layer out, or use "
            "strategy='fsdp_lora'"
        )
    if not isinstance(layer, (LoRALayer, Host, QuantizedLinear)) and type(layer).forward is not nn.Linear.forward:
        raise ValueError(f"{name!r} is a {type(layer).__name__} with a forward of its own, which cannot be split")
    size = layer.out_features if kind == "column" else layer.in_features
    if size % ranks:
        side = "out_features" if kind == "column" else "in_features"
        raise ValueError(f"{side}={size} of {name!r} is not divisible by tensor_parallel_size={ranks}")
    if stored_form(layer) is not None and not isinstance(layer, QuantizedLinear):
        raise ValueError(
            f"the weight of {name!r} is stored as {type(layer._parameters.get('weight')).__name__}, which cannot be "
            "split into parts: load the base in 16 bits and give quantize='nf4', or use strategy='fsdp_lora'"
        )
    if isinstance(layer, QuantizedLinear):
        check_blocks(name, layer, kind, ranks)
    adapters = layer.adapter_names if isinstance(layer, LoRALayer) else ()
    trained = [
        local
        for local, parameter in layer._parameters.items()
        if parameter is not None and parameter.requires_grad and local not in adapters
    ]
    if trained:
        raise ValueError(
            f"{name!r} trains its own {trained[0]!r} (modules_to_save, bias), which is not served in a split layer: "
            "leave it out, or use strategy='fsdp_lora'"
        )


def _split_linear(layer: Any, kind: str, is_whole: bool, mesh: DeviceMesh) -> None:
    base: Any = ColumnParallelLinear if kind == "column" else RowParallelLinear
    layer.__dict__.update(tp_group=mesh.get_group(), tp_whole_input=is_whole, tp_whole_output=is_whole)
    dim = 0 if kind == "column" else 1
    if isinstance(layer, QuantizedLinear):
        keep_packed_part(layer, mesh, kind)
        base = lora_class(QuantizedParallelLinear, base)
    else:
        keep_part(layer, "weight", mesh, dim)
    if kind == "column" and layer.bias is not None:
        keep_part(layer, "bias", mesh, 0)
    for adapter in adapters_of(layer):
        keep_part(adapter, "lora_B" if kind == "column" else "lora_A", mesh, dim)
        whole = adapter.lora_A if kind == "column" else adapter.lora_B
        whole.lora_tp_sum = True  # type: ignore[attr-defined]  # each rank has an addend of its gradient
    if isinstance(layer, LoRALayer):
        swap_class(layer, LoRAParallelLinear, base)
    elif isinstance(layer, Host):
        swap_class(layer, type(layer).__bases__[0], base)
        follow_base(layer, LoRAParallelLinear)
    else:
        layer.__class__ = base


def _tied_table(root: nn.Module, chosen: Collection[str]) -> tuple[nn.Module, nn.Embedding] | tuple[None, None]:
    """Return the output head of the plan and the embedding whose weight it shares, if it shares one."""
    head = root.get_output_embeddings() if is_pretrained(root) else None  # type: ignore[operator]
    if head is None or not any(module is head and clean_name(name) in chosen for name, module in root.named_modules()):
        return None, None
    weight = head._parameters["weight"]
    twins = [m for m in root.modules() if isinstance(m, nn.Embedding) and m._parameters["weight"] is weight]
    if not twins:
        return None, None
    if len(twins) > 1 or isinstance(twins[0], (LoRAEmbedding, TokenRows, Host)) or isinstance(head, (LoRALayer, Host)):
        raise ValueError(
            "the tied embedding or output head is adapted, and would have to be split over ranks with its twin: leave "
            "it out of target_modules and trainable_token_indices, or use strategy='fsdp_lora'"
        )
    return head, twins[0]


def _input_table(root: nn.Module, ranks: int) -> nn.Embedding | None:
    """Return the input embedding of a model whose output head is split, if its rows can be and nothing else has them.

    Adapted or trained, it stays whole, and so it does where a lookup changes rows (``max_norm``).
    """
    if not is_pretrained(root) or not isinstance(root.get_output_embeddings(), ColumnParallelLinear):  # type: ignore[operator]
        return None
    table: Any = root.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(table, nn.Embedding) or isinstance(table, (LoRALayer, Host)) or table.max_norm is not None:
        return None
    weight = table._parameters["weight"]
    holders = [m for m in root.modules() if any(p is weight for p in m._parameters.values())]
    is_free = weight is not None and not weight.requires_grad and len(holders) == 1
    return table if is_free and table.num_embeddings % ranks == 0 else None


def check_replicated(root: nn.Module) -> None:
    """Raise ``ValueError`` for adapters that tensor parallelism does not serve and that no plan names."""
    configs = require_injection(root).configs.values()
    if any(config.use_dora or config.lora_bias or config.starts_from_base for config in configs):
        raise ValueError(
            "use_dora, lora_bias, PiSSA and OLoRA are not served under tensor parallelism: leave them out, or use "
            "strategy='fsdp_lora'"
        )
