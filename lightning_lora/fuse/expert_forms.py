"""The written forms of fused experts, ``sum_k w_k down_e(G(gate_up_e(x)))``: of their loops, and of their gates ``G``.

transformers' decorator gives a class of experts several implementations. Two of them are functions of transformers
itself; the third, ``"eager"``, is the class's own ``forward``, whose code is compared with these loops.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Loop(NamedTuple):
    """What a loop over experts computes beside the formula's products.

    Attributes:
        has_own_gate: whether it calls ``self._apply_gate``; else it computes ``act_fn(a) * b`` of two halves.
        is_transposed: whether weights are ``[experts, in, out]``.
        has_bias: whether each product adds a bias.
    """

    has_own_gate: bool
    is_transposed: bool = False
    has_bias: bool = False


def _mixtral(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    final_hidden_states = torch.zeros_like(hidden_states)
    with torch.no_grad():
        expert_mask = torch.nn.functional.one_hot(top_k_index, num_classes=self.num_experts + 1)
        expert_mask = expert_mask.permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()

    for expert_idx in expert_hit:
        expert_idx = expert_idx[0]
        if expert_idx == self.num_experts:
            continue
        top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
        current_state = hidden_states[token_idx]
        gate, up = nn.functional.linear(current_state, self.gate_up_proj[expert_idx]).chunk(2, dim=-1)
        current_hidden_states = self.act_fn(gate) * up
        current_hidden_states = nn.functional.linear(current_hidden_states, self.down_proj[expert_idx])
        current_hidden_states = current_hidden_states * top_k_weights[token_idx, top_k_pos, None]
        final_hidden_states.index_add_(0, token_idx, current_hidden_states.to(final_hidden_states.dtype))

    return final_hidden_states


def _mixtral_5_0(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    final_hidden_states = torch.zeros_like(hidden_states)
    with torch.no_grad():
        expert_mask = torch.nn.functional.one_hot(top_k_index, num_classes=self.num_experts)
        expert_mask = expert_mask.permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()

    for expert_idx in expert_hit:
        expert_idx = expert_idx[0]
        if expert_idx == self.num_experts:
            continue
        top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
        current_state = hidden_states[token_idx]
        gate, up = nn.functional.linear(current_state, self.gate_up_proj[expert_idx]).chunk(2, dim=-1)
        current_hidden_states = self.act_fn(gate) * up
        current_hidden_states = nn.functional.linear(current_hidden_states, self.down_proj[expert_idx])
        current_hidden_states = current_hidden_states * top_k_weights[token_idx, top_k_pos, None]
        final_hidden_states.index_add_(0, token_idx, current_hidden_states.to(final_hidden_states.dtype))

    return final_hidden_states


def _deepseek_v4(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    final = torch.zeros_like(hidden_states)
    with torch.no_grad():
        mask = F.one_hot(top_k_index, num_classes=self.num_experts + 1).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert_idx in hit:
        expert_idx = expert_idx[0]
        if expert_idx == self.num_experts:
            continue
        top_k_pos, token_idx = torch.where(mask[expert_idx])
        current = self._apply_gate(F.linear(hidden_states[token_idx], self.gate_up_proj[expert_idx]))
        current = F.linear(current, self.down_proj[expert_idx]) * top_k_weights[token_idx, top_k_pos, None]
        final.index_add_(0, token_idx, current.to(final.dtype))
    return final


def _gpt_oss(self: Any, hidden_states: Any, router_indices: Any = None, routing_weights: Any = None) -> Any:
    next_states = torch.zeros_like(hidden_states, dtype=hidden_states.dtype, device=hidden_states.device)
    with torch.no_grad():
        expert_mask = torch.nn.functional.one_hot(router_indices, num_classes=self.num_experts)
        expert_mask = expert_mask.permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert_idx in expert_hit:
        expert_idx = expert_idx[0]
        if expert_idx == self.num_experts:
            continue
        top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
        current_state = hidden_states[token_idx]
        gate_up = current_state @ self.gate_up_proj[expert_idx] + self.gate_up_proj_bias[expert_idx]
        gated_output = self._apply_gate(gate_up)
        out = gated_output @ self.down_proj[expert_idx] + self.down_proj_bias[expert_idx]
        weighted_output = out * routing_weights[token_idx, top_k_pos, None]
        next_states.index_add_(0, token_idx, weighted_output.to(hidden_states.dtype))

    return next_states


LOOPS = {
    _mixtral: Loop(has_own_gate=False),
    _mixtral_5_0: Loop(has_own_gate=False),  # of transformers 5.0, without a class for tokens of no expert
    _deepseek_v4: Loop(has_own_gate=True),
    _gpt_oss: Loop(has_own_gate=True, is_transposed=True, has_bias=True),
}


def default_gate(self: Any, gate_up: Any) -> Any:
    """Return ``act_fn(a) * b`` of the halves ``[a, b]``: what transformers gives a class without a gate of its own."""
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up


def _deepseek_v4_gate(self: Any, gate_up: Any) -> Any:
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    return self.act_fn(gate) * up


def _glm5_gate(self: Any, gate_up: Any) -> Any:
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(min=None, max=self.swiglu_limit)
    up = up.clamp(min=-self.swiglu_limit, max=self.swiglu_limit)
    return F.silu(gate) * up


def _gpt_oss_gate(self: Any, gate_up: Any) -> Any:
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate = gate.clamp(min=None, max=self.limit)
    up = up.clamp(min=-self.limit, max=self.limit)
    glu = gate * torch.sigmoid(gate * self.alpha)
    gated_output = (up + 1) * glu
    return gated_output


def _minimax_m3_gate(self: Any, gate_up: Any) -> Any:
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=self.swiglu_limit)
    up = up.clamp(min=-self.swiglu_limit, max=self.swiglu_limit)
    glu = gate * torch.sigmoid(gate * self.swiglu_alpha)
    return (up + 1.0) * glu


OWN_GATES = (_deepseek_v4_gate, _glm5_gate, _gpt_oss_gate, _minimax_m3_gate)
# activations without parameters and random numbers, which are computed again in backward
OWN_ACTIVATIONS = ("transformers.activations.ReLUSquaredActivation", "transformers.activations.QuickGELUActivation")
