"""Megatron-core's column- and row-parallel linear layers, and their adapters.

Column: rank i holds rows of W and of B; A is whole. Row: rank i holds columns of W and of A; B is whole.

    x --- copy or gather ---+-- W_i x + s B_i A x --+-- y_i      x_i --+-- W_i x_i + s B A_i x_i --+-- reduce --- y

The adapter's term is computed in the base's local product, between its own collectives, so it adds none of its own.
With sequence parallelism a column layer multiplies by A before the sequence is gathered: what is gathered besides are
r numbers per token, and what is kept for backward is this rank's part of the sequence.

A layer that stacks several weights has one pair for each of them: q, k, v of ``linear_qkv``, gate and up of
``linear_fc1``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.adapt import become_lora_layer, register_factors
from lightning_lora.layers.base import LoRALayer, Pair, Part
from lightning_lora.megatron.core import collectives
from lightning_lora.megatron.names import Stack, is_output_head, parts_in, stack_in
from lightning_lora.megatron.parts import keep_parts
from lightning_lora.ops.linear import lora_linear


class LoRAMegatronLinear(LoRALayer):
    """An adapted layer of Megatron-core, with one pair or with one for each of the weights that it stacks.

    Attributes:
        lora_parts: rank and scaling by part; empty for a layer with one pair.
        lora_stack: how its rows are stacked, if they are.
    """

    is_linear = True
    row_dim = 1  # [sequence, batch, features]

    input_size: int
    output_size: int
    tp_group: Any  # torch.distributed.ProcessGroup
    lora_parts: dict[str, tuple[int, float]]
    lora_stack: Stack | None

    @classmethod
    @override
    def features(cls, layer: nn.Module) -> tuple[int, int]:
        base: Any = layer
        return int(base.input_size), int(base.output_size)

    @classmethod
    @override
    def check_use(cls, modules: Mapping[str, nn.Module], name: str, config: LoRAConfig) -> None:
        if is_output_head(modules, name):
            raise ValueError(
                f"{name!r} is the output head of a Megatron-core model, which is not adapted: leave it out of "
                f"target_modules, or train it whole with modules_to_save=[{name!r}]"
            )
        if config.use_dora or config.lora_bias or config.starts_from_base or config.init_rng == "peft":
            raise ValueError(
                f"{name!r} is a layer of Megatron-core, for which use_dora, lora_bias, PiSSA, OLoRA and "
                "init_rng='peft' are not served: leave the option out"
            )

    @classmethod
    @override
    def parts(cls, modules: Mapping[str, nn.Module], name: str, *, fused: bool) -> list[Part]:
        return [Part(name)] if is_output_head(modules, name) else parts_in(modules, name, fused=fused)

    @classmethod
    @override
    def adapt_parts(
        cls, modules: Mapping[str, nn.Module], name: str, pairs: Mapping[str, tuple[int, float]], **options: Any
    ) -> "LoRAMegatronLinear":
        layer: Any = modules[name]
        stack, like = stack_in(modules, name), layer._parameters["weight"]
        named = {} if "" in pairs else dict(pairs)  # "" alone is one pair for the whole layer
        attributes: dict[str, Any] = {"lora_parts": named, "lora_stack": stack}
        if named:
            attributes["adapter_names"] = tuple(f"lora_{factor}_{part}" for part in named for factor in "AB")
        (_, scaling), *_ = pairs.values()
        adapted = become_lora_layer(layer, cls, scaling=scaling, **options, **attributes)
        for part, (r, _) in pairs.items():
            suffix = f"_{part}" if part else ""
            rows = layer.output_size if stack is None or not part else stack.groups * stack.rows[part]
            shapes = {f"lora_A{suffix}": (r, layer.input_size), f"lora_B{suffix}": (rows, r)}
            register_factors(adapted, like, **shapes)
        return adapted

    @classmethod
    @override
    def tag_parts(cls, model: nn.Module) -> None:
        keep_parts(model)

    @override
    def pairs(self) -> dict[str, Pair]:
        if not self.lora_parts:
            return {"": Pair(self.lora_A, self.lora_B, self.lora_scaling, self.lora_A.shape[0])}
        return {
            part: Pair(getattr(self, f"lora_A_{part}"), getattr(self, f"lora_B_{part}"), scaling, r)
            for part, (r, scaling) in self.lora_parts.items()
        }

    @property
    @override
    def r(self) -> int:
        return sum(pair.r for pair in self.pairs().values())

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A ``[r, in_features]`` and B ``[out_features, r]`` on this rank, of all pairs together."""
        if not self.lora_parts:
            return self.lora_A, self.lora_B
        assert self.lora_stack is not None
        pairs = self.pairs()
        factors = {
            part: pair.B if pair.scaling == self.lora_scaling else pair.B * (pair.scaling / self.lora_scaling)
            for part, pair in pairs.items()
        }
        ranks = {part: pair.r for part, pair in pairs.items()}
        rows = self.base_weight.shape[0]
        return torch.cat([pair.A for pair in pairs.values()]), self.lora_stack.assembled(factors, ranks, rows)

    @override
    def dropout_seed(self) -> Tensor | None:
        base: Any = self
        if not (self.drops and base.config.sequence_parallel and self.base_weight.device.type == "cpu"):
            return super().dropout_seed()
        # a whole block runs on a stream that differs between ranks then; on CPU this is the stream of the seeds, too
        with collectives().get_cuda_rng_tracker().fork("data-parallel-rng"):
            return super().dropout_seed()

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
        base: Any = super()
        if not self.lora_active:
            product: Tensor = base._forward_impl(input, weight, *args, **options)
            return product
        if options.get("gtp_remat_size", 1) not in (None, 1):
            raise ValueError("gtp_remat_size above 1 is not served for adapted layers: leave it out of the config")
        A, B = self.factors()
        if options.get("sequence_parallel"):
            # beside a frozen weight Megatron-core gives a bias no gradient
            bias, options["bias"] = options.get("bias"), None
            y = self._beside_gathered(base._forward_impl(input, weight, *args, **options), input, A, B)
            return y if bias is None else y + bias.to(y.dtype)
        if options.get("allreduce_dgrad"):
            input = collectives().copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        return lora_linear(
            input,
            weight,
            options.get("bias"),
            A,
            B,
            scaling=self.lora_scaling,
            dropout=self.lora_dropout,
            seed=self.dropout_seed(),
            columns=self._columns(),
        )

    def _beside_gathered(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Return ``y + scaling * dropout(x) A^T B^T`` where ``x`` is this rank's part of the sequence and ``y`` is of
        the whole one. Gathers r numbers per token, and reduce-scatters as many in backward.

        Args:
            y: ``[sequence, batch, out_features / ranks]``
            x: ``[sequence / ranks, batch, in_features]``
        """
        rank = torch.distributed.get_rank(self.tp_group)
        h = lora_linear(  # times the unit matrix: what is kept for backward is x, and no mask
            x,
            None,
            None,
            A,
            torch.eye(A.shape[0], dtype=A.dtype, device=A.device),
            scaling=self.lora_scaling,
            dropout=self.lora_dropout,
            seed=self.dropout_seed(),
            first_row=rank * x.shape[0] * x.shape[1],
        )
        h = collectives().gather_from_sequence_parallel_region(h, tensor_parallel_output_grad=True, group=self.tp_group)
        rows = torch.addmm(y.flatten(0, -2), h.flatten(0, -2).to(y.dtype), B.t().to(y.dtype))
        return rows.view(y.shape)

    def _columns(self) -> tuple[int, int] | None:
        """Return where the features of this rank's input are, in a row-parallel layer."""
        width = self.input_size if self.lora_parts else self.lora_A.shape[1]
        if width == self.input_size:
            return None
        return torch.distributed.get_rank(self.tp_group) * width, self.input_size

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return Megatron-core's description of the base alone: adapters have a file of their own."""
        adapters = {name: self._parameters.pop(name) for name in self.tensor_names}
        try:
            return super().sharded_state_dict(*args, **kwargs)  # type: ignore[misc]  # the base layer's
        finally:
            self._parameters.update(adapters)
