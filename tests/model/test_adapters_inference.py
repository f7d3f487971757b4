"""Mixed batches in inference: PEFT's logits with the same adapters, and ``generate``."""

import copy
import random

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, active, add_adapter, named_adapter_parameters
from tests import models
from tests.model.test_adapters import backward, configs, equal, gradients, net, with_adapters, within

CONFIGS = {
    "law": {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "medicine": {"r": 2, "alpha": 3, "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"]},
}
NAMES = ["law", "__base__", "medicine", "law", "medicine"]
IDS = models.token_ids(rows=5, columns=6)


def with_ours(base: nn.Module) -> nn.Module:
    return with_adapters(base, {name: LoRAConfig(**fields) for name, fields in CONFIGS.items()}).eval()


def test_a_mixed_batch_has_the_logits_of_peft() -> None:
    import peft

    ours = with_ours(models.llama())
    fields = {n: {"lora_alpha" if k == "alpha" else k: v for k, v in c.items()} for n, c in CONFIGS.items()}
    theirs = peft.get_peft_model(models.llama(), peft.LoraConfig(**fields["law"]), adapter_name="law")
    theirs.add_adapter("medicine", peft.LoraConfig(**fields["medicine"]))
    values = dict(named_adapter_parameters(ours))
    copied = 0
    for key, parameter in theirs.named_parameters():
        layer, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
        if rest:
            factor, name, _ = rest.split(".")
            parameter.data.copy_(values[f"{layer}.lora.{name}.lora_{factor}"])
            copied += 1
    assert copied == len(values)
    with torch.no_grad(), active(ours, NAMES):
        within(1e-5)(ours(IDS).logits, theirs.eval()(IDS, adapter_names=NAMES).logits)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_runs_each_row_with_its_adapter(beams: int) -> None:
    model = with_ours(models.llama())
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    with active(model, NAMES, repeats=beams):
        found = model.generate(IDS, **options)
    for row, name in enumerate(NAMES):
        with active(model, name):
            equal(found[row], model.generate(IDS[row : row + 1], **options)[0])
    if beams > 1:
        with active(model, NAMES), pytest.raises(ValueError, match="take repeats=num_beams"):
            model.generate(IDS, **options)


@pytest.mark.parametrize("seed", range(12))
def test_permuting_rows_permutes_outputs_and_changes_no_gradient(seed: int) -> None:
    draw = random.Random(seed)
    model = with_adapters(net(), configs(fuse=draw.random() < 0.5))
    rows = draw.randint(1, 9)
    names = [draw.choice(["law", "medicine", "code", None]) for _ in range(rows)]
    ids = torch.randint(0, 50, (rows, draw.randint(1, 5)), generator=torch.Generator().manual_seed(seed))
    order = draw.sample(range(rows), rows)
    other = copy.deepcopy(model)
    with active(model, names):
        y = model(ids)
    with active(other, [names[row] for row in order]):
        permuted = other(ids[order])
    within(1e-12)(permuted, y[order])
    if set(names) != {None}:
        backward(y)
        backward(permuted)
    for name in ("law", "medicine", "code"):
        found, wanted = gradients(other, name), gradients(model, name)
        assert found.keys() == wanted.keys()
        assert bool(wanted) == (name in names)
        for key in wanted:
            within(1e-12)(found[key], wanted[key])


def test_segments_may_be_empty() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    add_adapter(add_adapter(model, "law", LoRAConfig(r=2)), "code", LoRAConfig(r=1))
    with active(model, ["law", "code", "law"], lengths=[0, 5, 0]):
        model(torch.ones(5, 4)).sum().backward()
    assert not gradients(model, "law")
    assert gradients(model, "code")
