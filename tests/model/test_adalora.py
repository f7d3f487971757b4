"""AdaLoRA's layers and pruning in a loop of one's own: against PEFT, and against dense float64 formulas."""

import copy
import pickle
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    AdaLoRA,
    LoRAConfig,
    RankAllocator,
    disabled,
    inject,
    merge,
    parameter_groups,
    plan,
    remove,
    unmerge,
)
from lightning_lora.layers.adalora import AdaLoRALinear
from lightning_lora.model.quantize import quantize
from lightning_lora.model.state import has_trained, named_lora_layers
from tests import models

STEPS = 24
# one order of sums or another in float32: the losses of 24 steps differ in their last digits
LOSSES = {"rtol": 0.0, "atol": 1e-5}
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
SCHEDULES = {
    "defaults": {},
    "phases and an interval": {"tinit": 3, "tfinal": 5, "deltaT": 3},
    "no term": {"orth_reg_weight": 0.0, "tinit": 2, "tfinal": 2},
}


def batches() -> list[Tensor]:
    return [models.token_ids(4, 8, seed=seed) for seed in range(STEPS)]


def settings(**schedule: Any) -> dict[str, Any]:
    return {"init_r": 6, "target_r": 3, "total_step": STEPS, **schedule}


def peft_run(schedule: dict[str, Any], make: Any = models.llama, **options: Any) -> tuple[list[float], list[Any], Any]:
    """Return losses, the entries of E that are zero after each step, and the model, of PEFT's own loop."""
    config = peft.AdaLoraConfig(
        **settings(**schedule), **{"target_modules": TARGETS, "lora_alpha": 12, **options}, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(make(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, zeros = [], []
    for step, batch in enumerate(batches(), start=1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
        zeros.append({
            name.removeprefix("base_model.model.").removesuffix(".lora_E.default"): (p == 0).flatten().tolist()
            for name, p in model.named_parameters()
            if "lora_E" in name
        })  # fmt: skip
    return losses, zeros, model


def adapted(make: Any = models.llama, **options: Any) -> nn.Module:
    schedule = {name: options.pop(name) for name in list(options) if name in AdaLoRA.__dataclass_fields__}
    fields = {"target_modules": TARGETS, "alpha": 12, "init_rng": "peft", **options}
    torch.manual_seed(0)
    return inject(make(), LoRAConfig(adalora=AdaLoRA(**settings(**schedule)), **fields))


class Loop:
    """Trains an adapted model by hand, with AdaLoRA's term in the gradients."""

    def __init__(self, model: nn.Module, lr: float = 1e-2) -> None:
        config = model.lora_injection.config.adalora
        self.model, self.allocator = model, RankAllocator(model, config, config.total_step)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)

    def step(self, batch: Tensor) -> float:
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        total = loss + self.allocator.add_regularizer()
        self.optimizer.step()
        self.allocator.after_step()
        self.optimizer.zero_grad()
        return total.item()

    def zeros(self) -> dict[str, list[bool]]:
        return {name: (layer.lora_E == 0).flatten().tolist() for name, layer in self.allocator.layers.items()}


@pytest.mark.parametrize("name", SCHEDULES)
def test_losses_and_pruned_ranks_are_those_of_peft(name: str) -> None:
    theirs, their_zeros, peft_model = peft_run(SCHEDULES[name])
    loop = Loop(adapted(**SCHEDULES[name]))
    start = {n: p.detach().clone() for n, p in loop.model.named_parameters() if "lora_" in n}
    ours, our_zeros = [], []
    for batch in batches():
        ours.append(loop.step(batch))
        our_zeros.append(loop.zeros())
    torch.testing.assert_close(ours, theirs, **LOSSES)
    assert our_zeros == their_zeros
    assert sum(map(sum, our_zeros[-1].values())) == 3 * len(our_zeros[-1])  # half of the ranks are pruned
    assert len({sum(zeros) for zeros in our_zeros[-1].values()}) > 1  # not the same number in every layer
    for layer_name, layer in loop.allocator.layers.items():
        twin = peft_model.base_model.model.get_submodule(layer_name)
        for factor in "ABE":
            value = getattr(twin, f"lora_{factor}")["default"]
            torch.testing.assert_close(getattr(layer, f"lora_{factor}"), value, rtol=0.0, atol=1e-4)
            if factor != "E":
                assert not torch.equal(start[f"{layer_name}.lora_{factor}"], value)


def test_starting_values_are_peft_s_own() -> None:
    config = peft.AdaLoraConfig(**settings(), target_modules=TARGETS, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    theirs = peft.get_peft_model(models.llama(), config)
    torch.manual_seed(0)
    ours = inject(models.llama(), LoRAConfig.from_peft(config))
    layers = named_lora_layers(ours)
    assert len(layers) == 8
    for name, layer in layers.items():
        twin = theirs.base_model.model.get_submodule(name)
        for factor in "ABE":
            assert torch.equal(getattr(layer, f"lora_{factor}"), getattr(twin, f"lora_{factor}")["default"])
    assert not has_trained(ours)
    batch = models.token_ids()
    assert torch.equal(ours(input_ids=batch).logits, models.llama()(input_ids=batch).logits)


def test_starting_values_depend_on_the_name_alone() -> None:
    one = adapted(init_rng="name")
    other = adapted(init_rng="name", target_modules=["v_proj"])
    for name, layer in named_lora_layers(other).items():
        assert torch.equal(layer.lora_A, named_lora_layers(one)[name].lora_A)
    A = torch.cat([layer.lora_A.flatten() for layer in named_lora_layers(one).values()])
    assert A.std().item() == pytest.approx(0.02, rel=0.1)


def test_logits_are_those_of_the_dense_formula() -> None:
    model = adapted()
    models.fill_adapters(model)
    batch = models.token_ids()
    dense = models.llama().double()
    with torch.no_grad():
        for name, layer in named_lora_layers(model).items():
            A, B, E = (getattr(layer, f"lora_{x}").double() for x in "ABE")
            dense.get_submodule(name).weight += 12 / (6 + 1e-5) * B @ torch.diag(E[:, 0]) @ A
    # float32 beside float64
    torch.testing.assert_close(
        model(input_ids=batch).logits.double(), dense(input_ids=batch).logits, rtol=1e-4, atol=1e-5
    )


def reference_scores(history: list[list[dict[str, Tensor]]], beta1: float, beta2: float) -> list[Tensor]:
    """Return the scores of each layer, from what p and its gradient were at each step, in float64."""
    scores = []
    for layer in range(len(history[0])):
        importance = {}
        for factor in "ABE":
            S = U = torch.zeros((), dtype=torch.float64)
            for step in history:
                p, g = step[layer][factor].double(), step[layer][f"grad_{factor}"].double()
                now = (p * g).abs()
                S = beta1 * S + (1 - beta1) * now
                U = beta2 * U + (1 - beta2) * (now - S).abs()
            importance[factor] = S * U
        r = importance["E"].shape[0]
        scores.append(
            torch.stack([
                importance["E"][k, 0] + importance["A"][k].sum() / importance["A"].shape[1]
                + importance["B"][:, k].sum() / importance["B"].shape[0]
                for k in range(r)
            ])
        )  # fmt: skip
    return scores


def test_scores_are_those_of_the_dense_formula() -> None:
    loop = Loop(adapted(tinit=5, beta1=0.7, beta2=0.9))
    history = []
    for batch in batches()[:5]:
        loop.model(input_ids=batch, labels=batch).loss.backward()
        loop.allocator.add_regularizer()
        loop.optimizer.step()
        history.append([
            {
                **{x: getattr(layer, f"lora_{x}").detach().clone() for x in "ABE"},
                **{f"grad_{x}": getattr(layer, f"lora_{x}").grad.clone() for x in "ABE"},
            }
            for layer in loop.allocator.layers.values()
        ])  # fmt: skip
        loop.allocator.after_step()
        loop.optimizer.zero_grad()
    expected = reference_scores(history, 0.7, 0.9)
    ours = loop.allocator.scores()
    for name, reference in zip(loop.allocator.layers, expected, strict=True):
        torch.testing.assert_close(ours[name].double(), reference, rtol=1e-5, atol=0.0)  # float32 beside float64


def test_the_added_gradient_is_that_of_the_loss_term() -> None:
    model = adapted(orth_reg_weight=0.3)
    models.fill_adapters(model, std=0.3)
    batch, loop = models.token_ids(), Loop(model)
    model(input_ids=batch, labels=batch).loss.backward()
    value = loop.allocator.add_regularizer()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    norms = []
    for layer in named_lora_layers(model).values():
        A, B = layer.lora_A, layer.lora_B
        norms += [torch.linalg.norm(A @ A.T - torch.eye(6)), torch.linalg.norm(B.T @ B - torch.eye(6))]
    term = 0.3 * sum(norms) / len(norms)
    (model(input_ids=batch, labels=batch).loss + term).backward()
    assert ours.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(value, term.detach())
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-7)


def test_orthonormal_factors_get_no_gradient_from_the_term() -> None:
    model = inject(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(adalora=AdaLoRA(**settings())))
    with torch.no_grad():
        model[0].lora_A.copy_(torch.eye(6, 8))
        model[0].lora_B.copy_(torch.eye(8, 6))
    assert RankAllocator(model, AdaLoRA(**settings()), STEPS).add_regularizer().item() == 0
    assert not model[0].lora_A.grad.any()
    assert not model[0].lora_B.grad.any()


def test_a_state_goes_on_exactly_where_it_was_taken() -> None:
    straight = Loop(adapted(tinit=2, tfinal=4, deltaT=2))
    for batch in batches()[:13]:
        straight.step(batch)
    again = Loop(adapted(tinit=2, tfinal=4, deltaT=2))
    again.model.load_state_dict(straight.model.state_dict())
    again.optimizer.load_state_dict(copy.deepcopy(straight.optimizer.state_dict()))
    again.allocator.load_state_dict(copy.deepcopy(straight.allocator.state_dict()))
    for batch in batches()[13:]:
        assert straight.step(batch) == again.step(batch)
        assert straight.zeros() == again.zeros()
    assert all(torch.equal(p, again.model.get_parameter(name)) for name, p in straight.model.named_parameters())
    assert straight.allocator.history() == again.allocator.history()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"target_modules": ["q_proj"]}, "is of other layers"),
        ({"total_step": 30}, "is of total_step=24, not 30"),
        ({"init_r": 5}, r"has \(6, 32\) for 'S lora_A' of 'model.layers.0.self_attn.q_proj', the layer \(5, 32\)"),
    ],
)
def test_a_state_of_another_schedule_is_refused(other: dict[str, Any], message: str) -> None:
    loop, another = Loop(adapted(tinit=4)), Loop(adapted(**{"tinit": 4, **other}))
    loop.step(batches()[0])
    with pytest.raises(ValueError, match=message):
        another.allocator.load_state_dict(loop.allocator.state_dict())
    assert another.allocator.step == 0


def test_equal_ranks_at_start_and_end_prune_nothing() -> None:
    loop = Loop(adapted(init_r=4, target_r=4))
    losses = [loop.step(batch) for batch in batches()]
    assert not any(map(any, loop.zeros().values()))
    assert losses[-1] < losses[0]


def test_a_layer_without_gradients_counts_as_unimportant() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    config = AdaLoRA(init_r=4, target_r=2, total_step=4, orth_reg_weight=0.0)
    model = inject(TwoHeads(), LoRAConfig(adalora=config))
    allocator = RankAllocator(model, config, 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        model(torch.randn(3, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        allocator.after_step()
        optimizer.zero_grad()
    assert allocator.history()[1]["unused"][-1] == 0
    assert allocator.history()[1]["used"][-1] == 4


def test_the_history_says_the_ranks_of_each_layer_by_step() -> None:
    loop = Loop(adapted(tinit=4, tfinal=4))
    for batch in batches():
        loop.step(batch)
    steps, ranks = loop.allocator.history()
    assert steps == list(range(1, STEPS + 1))
    assert list(ranks) == list(loop.allocator.layers)
    totals = [sum(values) for values in zip(*ranks.values(), strict=True)]
    assert totals[:4] == [48] * 4
    assert totals == sorted(totals, reverse=True)
    assert totals[-5:] == [24] * 5
    assert {name: 6 - sum(zeros) for name, zeros in loop.zeros().items()} == {n: r[-1] for n, r in ranks.items()}


def trained() -> nn.Module:
    loop = Loop(adapted())
    for batch in batches()[:6]:
        loop.step(batch)
    return loop.model.eval()


def test_merging_gives_the_same_logits_and_unmerging_the_base() -> None:
    model, batch = trained(), models.token_ids()
    base = {name: p.clone() for name, p in model.state_dict().items()}
    expected = model(input_ids=batch).logits
    torch.testing.assert_close(merge(model)(input_ids=batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(
        model.model.layers[0].self_attn.q_proj.weight, base["model.layers.0.self_attn.q_proj.weight"]
    )
    unmerge(model)
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(input_ids=batch).logits, expected, rtol=0.0, atol=0.0)


def test_disabled_and_removed_adapters_leave_the_base() -> None:
    model, batch = trained(), models.token_ids()
    expected = models.llama().eval()(input_ids=batch).logits
    assert not torch.equal(model(input_ids=batch).logits, expected)
    with disabled(model):
        assert torch.equal(model(input_ids=batch).logits, expected)
    assert torch.equal(remove(model)(input_ids=batch).logits, expected)
    assert model.state_dict().keys() == models.llama().state_dict().keys()


def test_copies_and_pickles_compute_the_same_and_generate() -> None:
    model, batch = trained(), models.token_ids(2, 5)
    expected = model.generate(batch, max_new_tokens=4, do_sample=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.generate(batch, max_new_tokens=4, do_sample=False), expected)
        assert isinstance(twin.model.layers[0].self_attn.q_proj, AdaLoRALinear)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    model = trained().train()
    batch = models.token_ids()
    model(input_ids=batch, labels=batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    models.checkpoint_activations(model, {"use_reentrant": False})
    model(input_ids=batch, labels=batch).loss.backward()
    assert all(torch.equal(model.get_parameter(name).grad, gradient) for name, gradient in expected.items())


def test_conv1d_and_dropout_train() -> None:
    model = adapted(models.gpt2, target_modules=["c_attn", "c_proj"], dropout=0.3)
    model.train()
    loop = Loop(model)
    losses = [loop.step(batch) for batch in batches()]
    assert losses[-1] < losses[0]
    assert all(any(zeros) for zeros in loop.zeros().values()) or any(map(any, loop.zeros().values()))


def test_a_layer_smaller_than_the_rank_starts_at_its_size() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))
    decided = plan(model, LoRAConfig(adalora=AdaLoRA(init_r=4, target_r=3)))
    assert [pair.r for pair in decided] == [4, 2]
    assert [pair.num_parameters for pair in decided] == [4 * 33, 2 * 19]
    inject(model, LoRAConfig(adalora=AdaLoRA(init_r=4, target_r=3)))
    allocator = RankAllocator(model, AdaLoRA(init_r=4, target_r=3), 10)
    assert allocator.num_ranks == (6, 5)  # of 4 and 2, and of 3 and 2
    with pytest.raises(ValueError, match=r"'0' has 4 ranks, and AdaLoRA\(init_r=8\) says that it started at 8"):
        RankAllocator(model, AdaLoRA(init_r=8, target_r=3), 10)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target_r": 8, "init_r": 4}, "AdaLoRA(target_r=8, init_r=4)"),
        ({"target_r": 0}, "target_r=0"),
        ({"tinit": -1}, "tinit=-1"),
        ({"deltaT": 0}, "deltaT=0"),
        ({"beta1": 1.0}, "beta1=1.0"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight=-0.1"),
        ({"orth_reg_weight": float("nan")}, "orth_reg_weight=nan"),
        ({"total_step": 10, "tinit": 4, "tfinal": 6}, "no step is left to prune in"),
        ({"init_r": True}, "init_r=True"),
        ({"beta2": "0.5"}, "beta2='0.5'"),
    ],
)
def test_wrong_settings_are_refused_with_their_names(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        AdaLoRA(**wrong)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"use_rslora": True}, "use_rslora=True"),
        ({"init": "pissa"}, "init='pissa'"),
        ({"init": "gaussian"}, "init='gaussian'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"r": 16}, "r=16"),
    ],
)
def test_options_that_exclude_adalora_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        LoRAConfig(adalora=AdaLoRA(), **fields)
    assert message in str(caught.value)
    assert "AdaLoRA" in str(caught.value) or "adalora" in str(caught.value)


def test_layers_of_other_kinds_are_refused_by_name() -> None:
    model = models.llama()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'model.embed_tokens' cannot be adapted with adalora: Embedding"):
        inject(model, LoRAConfig(adalora=AdaLoRA(), target_modules=["embed_tokens", "q_proj"]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_config_survives_its_dictionary_and_peft_s() -> None:
    config = LoRAConfig(adalora=AdaLoRA(target_r=3, init_r=5, tinit=7, total_step=99), target_modules=["q_proj"])
    assert config.r == 5
    assert LoRAConfig.from_dict(config.to_dict()) == config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.AdaLoraConfig(**config.to_peft())
    back = LoRAConfig.from_peft(theirs)
    assert back.adalora == config.adalora
    assert back.alpha == 10
    with pytest.raises(ValueError, match="total_step"):
        LoRAConfig(adalora=AdaLoRA()).to_peft()
    with pytest.raises(TypeError, match="adalora=8 must be an AdaLoRA"):
        LoRAConfig(adalora=8)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_trains_as_its_dense_values(kind: str) -> None:
    config = LoRAConfig(adalora=AdaLoRA(**settings()), target_modules=TARGETS)
    packed, dense = models.llama(), models.llama()
    quantize(packed, kind)
    with torch.no_grad():
        for name, layer in packed.named_modules():
            if isinstance(layer, nn.Linear) and name != "lm_head":
                dense.get_submodule(name).weight.copy_(layer.weight)
    runs = [Loop(inject(model, config)) for model in (packed, dense)]
    losses = [[run.step(batch) for batch in batches()[:8]] for run in runs]
    torch.testing.assert_close(*losses, **LOSSES)
    assert runs[0].zeros() == runs[1].zeros()


def test_the_groups_of_lora_plus_have_E_beside_A() -> None:
    model = adapted()
    groups = {group["name"]: {id(p) for p in group["params"]} for group in parameter_groups(model, lr=1e-3)}
    for layer in named_lora_layers(model).values():
        assert {id(layer.lora_A), id(layer.lora_E)} <= groups["A"]
        assert id(layer.lora_B) in groups["B"]


def test_narrow_factors_are_scored_in_float32() -> None:
    loop = Loop(adapted(init_rng="name", adapter_dtype="bfloat16"))
    losses = [loop.step(batch) for batch in batches()]
    assert losses[-1] < losses[0]
    assert sum(map(sum, loop.zeros().values())) == 3 * 8
    assert all(layer.lora_A.dtype == torch.bfloat16 for layer in loop.allocator.layers.values())
    half = Loop(adapted(init_rng="name", adapter_dtype="bfloat16", tinit=5))
    half.step(batches()[0])
    assert all(scores.dtype == torch.float32 for scores in half.allocator.scores().values())
