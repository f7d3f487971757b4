"""``linear_cross_entropy`` on one process: against dense float64 math, and against transformers' own loss."""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_lora import LoRAConfig, inject, linear_cross_entropy, named_adapter_parameters
from lightning_lora.ops.cross_entropy import tiles
from lightning_lora.ops.cross_entropy.chunked import losses_of_linear
from tests import models, zoo
from tests.live_bytes import watched

ROWS, WIDTH, VOCAB = 19, 16, 300
TILE = (8, 70)
EXACT = {"rtol": 0.0, "atol": 0.0}


@pytest.fixture
def many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 8 rows and 70 columns, neither of which divides the logits."""
    monkeypatch.setattr(tiles, "_tile", lambda *_: TILE)


class Problem:
    """Hidden states, a head and targets, in one dtype."""

    def __init__(
        self, dtype: torch.dtype, rows: int = ROWS, *, bias: bool = False, softcap: float | None = None
    ) -> None:
        self.x = torch.randn(rows, WIDTH).to(dtype).requires_grad_()
        self.weight = torch.randn(VOCAB, WIDTH).to(dtype)
        self.bias = torch.randn(VOCAB).to(dtype) if bias else None
        self.targets = torch.randint(VOCAB, (rows,))
        self.softcap = softcap
        self.grad = torch.randn(rows).to(torch.promote_types(dtype, torch.float32))

    def ours(self) -> Tensor:
        return losses_of_linear(self.x, self.weight, self.bias, self.targets, softcap=self.softcap)

    def dense(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return losses and the gradient of x by F.linear and F.cross_entropy, in a dtype or the problem's."""
        dtype = dtype or self.x.dtype
        x = self.x.detach().to(dtype).requires_grad_()
        z = F.linear(x, self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        if self.softcap:
            z = self.softcap * torch.tanh(z / self.softcap)
        losses = F.cross_entropy(z.to(torch.promote_types(dtype, torch.float32)), self.targets, reduction="none")
        losses.backward(self.grad.to(losses.dtype))
        assert x.grad is not None
        return losses.detach(), x.grad


HEADS = {"plain": {}, "bias": {"bias": True}, "softcap": {"softcap": 2.0}, "both": {"bias": True, "softcap": 2.0}}


@pytest.mark.usefixtures("many_tiles")
class TestAgainstDenseMath:
    @pytest.mark.parametrize("rows", [1, 8, ROWS])
    @pytest.mark.parametrize("head", HEADS)
    def test_losses_and_gradient_in_float64(self, head: str, rows: int) -> None:
        problem = Problem(torch.float64, rows, **HEADS[head])
        losses = problem.ours()
        losses.backward(problem.grad)
        expected = problem.dense()
        torch.testing.assert_close((losses.detach(), problem.x.grad), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("head", HEADS)
    def test_narrow_dtypes_are_as_exact_as_dense_math_in_them(self, head: str, dtype: torch.dtype) -> None:
        problem = Problem(dtype, 200, **HEADS[head])
        losses = problem.ours()
        losses.backward(problem.grad)
        exact, dense = problem.dense(torch.float64), problem.dense()

        def error(found: Tensor, expected: Tensor) -> float:
            return float((found.detach().double() - expected).norm() / expected.norm())

        assert losses.dtype == torch.float32
        # roundings come in another order; the dense gradient has one less
        assert error(losses, exact[0]) <= 1.2 * error(dense[0], exact[0]) + 1e-7
        assert error(problem.x.grad, exact[1]) <= 1.2 * error(dense[1], exact[1]) + 1e-7

    def test_a_well_predicted_token_keeps_its_gradient_in_bfloat16(self) -> None:
        problem = Problem(torch.bfloat16)
        with torch.no_grad():
            problem.x.copy_(3 * problem.weight[problem.targets])  # p of the target within 1e-6 of 1 for most
        losses = problem.ours()
        losses.sum().backward()
        problem.grad.fill_(1.0)
        _, expected = problem.dense(torch.float64)
        error = (problem.x.grad.double() - expected).norm(dim=1) / expected.norm(dim=1)
        # one minus p, rounded to bfloat16, would be 0; logits are rounded to 2^-9 of about 50, which is 10 %
        assert error.max() < 0.25
        assert losses.min() < 1e-6

    def test_a_flat_softmax_keeps_its_gradient_in_float16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        size = 277_310  # its probabilities are 60.5 of the least float16
        monkeypatch.setattr(tiles, "_tile", lambda *_: (8, size))
        x, weight = torch.zeros(1, 4, dtype=torch.float16, requires_grad=True), torch.randn(size, 4).half() + 1
        losses_of_linear(x, weight, None, torch.tensor([3])).sum().backward()
        expected = weight.double().mean(0) - weight[3].double()
        torch.testing.assert_close(x.grad[0].double(), expected, rtol=2e-3, atol=2e-3)  # 2^-11, thrice

    def test_a_loss_scale_beyond_float16_does_not_overflow(self) -> None:
        problem = Problem(torch.float16)
        problem.weight.mul_(0.01)
        problem.ours().backward(problem.grad.fill_(1e5))  # infinite in float16
        _, expected = problem.dense(torch.float64)
        torch.testing.assert_close(problem.x.grad.double(), expected, rtol=5e-3, atol=5.0)  # 2^-11, of a few thousand

    def test_logits_of_minus_infinity_have_no_part(self) -> None:
        problem = Problem(torch.float64, bias=True)
        problem.bias[:200] = -torch.inf
        problem.targets.clamp_(min=200)
        losses = problem.ours()
        losses.backward(problem.grad)
        torch.testing.assert_close((losses.detach(), problem.x.grad), problem.dense())
        only = losses_of_linear(problem.x[:1], problem.weight[:1], None, problem.targets[:1] * 0)
        assert only.item() == 0.0
        problem.x.grad = None
        only.sum().backward()
        assert not problem.x.grad.any()  # nor is it nan

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("columns", [slice(0, 70), slice(100, 230)])
    def test_tiles_of_minus_infinity_alone_have_no_part(self, columns: slice, dtype: torch.dtype) -> None:
        problem = Problem(dtype, bias=True)
        problem.bias[columns] = -torch.inf  # as of tokens that only fill up the vocabulary
        problem.targets[problem.bias[problem.targets] == -torch.inf] = 299
        losses = problem.ours()
        losses.backward(problem.grad)
        expected = problem.dense(torch.float64)
        tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}  # 2^-9 of logits of about 10
        torch.testing.assert_close((losses.detach(), problem.x.grad), expected, check_dtype=False, **tolerance)

    @pytest.mark.parametrize("grow", [True, False])
    def test_logits_of_any_size_in_any_order_lose_nothing(self, grow: bool) -> None:
        problem = Problem(torch.float32, bias=True)
        problem.bias.copy_(
            torch.linspace(*((-400.0, 400.0) if grow else (400.0, -400.0)), VOCAB)
        )  # exp of the difference is beyond float32
        losses = problem.ours()
        losses.backward(problem.grad)
        expected = problem.dense(torch.float64)
        # logits of 400 have 3e-5
        torch.testing.assert_close(losses.detach(), expected[0].float(), rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(problem.x.grad, expected[1].float(), rtol=1e-4, atol=1e-4)

    def test_no_rows_have_no_losses_and_a_gradient_of_their_shape(self) -> None:
        problem = Problem(torch.float32, 0)
        problem.ours().sum().backward()
        assert problem.x.grad.shape == (0, WIDTH)


@pytest.mark.usefixtures("many_tiles")
class TestAutograd:
    def test_a_graph_can_be_gone_through_twice(self) -> None:
        problem = Problem(torch.float32)
        losses = problem.ours()
        losses.backward(problem.grad, retain_graph=True)
        once = problem.x.grad.clone()
        losses.backward(2 * problem.grad)
        torch.testing.assert_close(problem.x.grad, 3 * once)

    def test_a_second_derivative_is_refused(self) -> None:
        problem = Problem(torch.float64)
        with pytest.raises(RuntimeError, match="can be differentiated once, .* create_graph=True: use F.cross_entropy"):
            torch.autograd.grad(problem.ours().sum(), problem.x, create_graph=True)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients_no_product_with_the_weight_is_made(self, mode: Callable[[], Any]) -> None:
        problem = Problem(torch.float32)
        expected = problem.ours()
        with mode(), FlopCounterMode(display=False) as counted:
            losses = problem.ours()
        assert counted.get_total_flops() == 2 * ROWS * WIDTH * VOCAB
        torch.testing.assert_close(losses, expected.detach(), **EXACT)
        assert not losses.requires_grad

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_changes_nothing(self, reentrant: bool) -> None:
        problem = Problem(torch.float32)
        checkpoint(lambda x: losses_of_linear(x, problem.weight, None, problem.targets), problem.x,
                   use_reentrant=reentrant).backward(problem.grad)  # fmt: skip
        found, problem.x.grad = problem.x.grad, None
        problem.ours().backward(problem.grad)
        torch.testing.assert_close(found, problem.x.grad, **EXACT)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_autocast_computes_logits_as_linear_does(self, dtype: torch.dtype) -> None:
        problem = Problem(dtype, bias=True)
        with torch.autocast("cpu", torch.bfloat16):
            losses = problem.ours()
            logits = F.linear(problem.x, problem.weight, problem.bias)
        expected = F.cross_entropy(logits.to(losses.dtype), problem.targets, reduction="none")
        torch.testing.assert_close(losses, expected)
        losses.backward(problem.grad)
        (reference,) = torch.autograd.grad(expected, problem.x, problem.grad.to(losses.dtype))
        # of bfloat16, 2^-9, at the gradient's size of a few units
        tolerance = {} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.05}
        torch.testing.assert_close(problem.x.grad, reference, **tolerance)

    def test_what_the_caller_holds_stays_as_it_was(self) -> None:
        problem = Problem(torch.float32, **HEADS["both"])
        held = [problem.x, problem.weight, problem.bias, problem.targets, problem.grad]
        before = [tensor.detach().clone() for tensor in held]
        losses = problem.ours()
        value = losses.detach().clone()
        losses.backward(problem.grad)
        assert all(torch.equal(tensor, former) for tensor, former in zip(held, before, strict=True))
        assert torch.equal(losses, value)


class TestMemory:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("softcap", [None, 30.0])
    @pytest.mark.parametrize("rows", [1800, 2048])
    def test_less_than_a_twentieth_of_the_logits_exists_at_once(
        self, dtype: torch.dtype, softcap: float | None, rows: int
    ) -> None:
        size = 32_768  # of more columns a lesser share
        x, weight = torch.randn(rows, 8).to(dtype).requires_grad_(), torch.randn(size, 8).to(dtype)
        targets = torch.randint(size, (rows,))
        with watched() as found:  # all that is made, logits or not
            losses_of_linear(x, weight, None, targets, softcap=softcap).mean().backward()
        assert 0 < found.peak < 0.05 * rows * size * x.element_size()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("device_type", ["cpu", "cuda"])
    @pytest.mark.parametrize("softcap", [None, 30.0])
    def test_tiles_and_sums_of_a_large_head_are_less_than_a_twentieth(
        self, dtype: torch.dtype, device_type: str, softcap: float | None
    ) -> None:
        rows, width, size = 2048, 1024, 151_936
        x = SimpleNamespace(shape=(rows, width), element_size=lambda: dtype.itemsize, device=torch.device(device_type))
        num_rows, num_columns = tiles._tile(x, size, softcap)
        copies = (dtype.itemsize if dtype.itemsize < 4 else 0) + 4 * (2 if softcap else 1)
        sums = num_rows * width * (4 + 4 + dtype.itemsize)  # over the vocabulary, of a tile, and in the dtype of x
        kept = rows * width * dtype.itemsize
        assert num_rows * num_columns * copies + sums + kept < 0.05 * rows * size * dtype.itemsize

    def test_few_logits_are_one_tile(self) -> None:
        assert tiles._tile(torch.empty(20, 4), 32_768, None) == (24, 32_768)

    def test_kept_for_backward_are_the_gradient_and_a_number_per_row(self) -> None:
        problem, kept = Problem(torch.float32), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            losses = problem.ours()
        assert sorted(tuple(tensor.shape) for tensor in kept) == [(ROWS,), (ROWS, WIDTH)]
        del losses


def with_labels(model: nn.Module, lora: dict[str, Any] | None = None) -> tuple[nn.Module, Tensor, Tensor]:
    if lora is not None:
        inject(model, LoRAConfig(r=4, **lora))
        models.fill_adapters(model)
    ids = models.token_ids(3, 11)
    labels = ids.clone()
    labels[:, ::3] = -100
    labels[0] = -100
    return model, ids, labels


def ours(model: Any, ids: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    return linear_cross_entropy(model, model.model(ids).last_hidden_state, labels, **settings)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def family(name: str) -> nn.Module:
    return next(one for one in zoo.FAMILIES if one.name == name).build()


def biased() -> nn.Module:
    model = models.llama()
    model.lm_head.bias = nn.Parameter(torch.randn(models.VOCAB))
    return model


BODY = {"target_modules": ["q_proj", "down_proj"]}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any] | None, bool]] = {  # and whether tiles are made
    "untied": (models.llama, BODY, True),
    "tied": (lambda: models.llama(tied=True), BODY, True),
    "bias": (biased, BODY, True),
    "softcap": (lambda: family("gemma2"), BODY, True),
    "qwen3": (models.qwen3, BODY, True),
    "adapted head": (models.llama, {"target_modules": ["q_proj", "lm_head"]}, False),
    "adapted table": (lambda: models.llama(tied=True), {"target_modules": ["q_proj", "embed_tokens"]}, True),
    "trained head": (models.llama, {**BODY, "modules_to_save": ["lm_head"]}, False),
    "trained rows": (models.llama, {**BODY, "trainable_token_indices": {"lm_head": [1, 5]}}, False),
    "all trained": (models.llama, None, False),
}


@pytest.mark.usefixtures("many_tiles")
class TestAgainstTransformers:
    @pytest.mark.parametrize("name", MODELS)
    def test_loss_and_every_gradient_are_transformers_own(self, name: str) -> None:
        make, lora, chunked = MODELS[name]
        model, ids, labels = with_labels(make(), lora)
        hidden = model.model(ids).last_hidden_state
        with watched() as found:
            loss = linear_cross_entropy(model, hidden, labels)
        expected = model(ids, labels=labels).loss
        torch.testing.assert_close(loss, expected)
        # other order of sums
        torch.testing.assert_close(gradients(model, loss), gradients(model, expected), rtol=1e-4, atol=1e-6)
        assert found.largest == (math.prod(TILE) if chunked else 14 * models.VOCAB)

    def test_all_labels_are_learned(self) -> None:
        model, ids, _ = with_labels(models.llama(), BODY)
        torch.testing.assert_close(ours(model, ids, ids), model(ids, labels=ids).loss)

    def test_nothing_learned_is_a_loss_of_zero_with_zero_gradients(self) -> None:
        model, ids, labels = with_labels(models.llama(), BODY)
        for num_items in (None, 3, torch.tensor(0), 0):
            loss = ours(model, ids, torch.full_like(labels, -100), num_items=num_items)
            assert loss.item() == 0.0
            assert not any(value.any() for value in gradients(model, loss).values())

    def test_bfloat16_models_keep_the_loss_in_float32(self) -> None:
        model, ids, labels = with_labels(models.llama(dtype=torch.bfloat16), BODY)
        loss = ours(model, ids, labels)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, model(ids, labels=labels).loss.float(), rtol=1e-3, atol=1e-3)

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's gaps
    def test_a_compiled_step_is_the_same(self) -> None:
        model, ids, labels = with_labels(models.llama(), BODY)

        def step(x: Tensor, labels: Tensor) -> Tensor:
            return 3 * linear_cross_entropy(model, x.tanh(), labels)

        torch._dynamo.reset()
        compiled = torch.compile(step, backend="aot_eager")
        for batch in (labels, labels[:2]):  # and with other numbers of rows
            x = torch.randn(*batch.shape, 32, requires_grad=True)
            expected, found = step(x, batch), compiled(x, batch)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))
        torch._dynamo.reset()


def doubling(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class TestOtherHeads:
    def expected(self, model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
        return model(ids, labels=labels).loss

    def test_hooks_run(self) -> None:
        model, ids, labels = with_labels(models.llama(), BODY)
        plain = ours(model, ids, labels)
        handle = model.lm_head.register_forward_hook(doubling)
        torch.testing.assert_close(ours(model, ids, labels), self.expected(model, ids, labels))
        assert not torch.allclose(ours(model, ids, labels), plain)
        handle.remove()
        seen: list[Tensor] = []
        model.lm_head.register_full_backward_hook(lambda module, grads, outputs: seen.append(outputs[0]))
        ours(model, ids, labels).backward()
        assert seen[0].shape[1] == models.VOCAB
        model.lm_head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        torch.testing.assert_close(ours(model, ids, labels), self.expected(model, ids, labels))

    def test_hooks_on_all_modules_run(self) -> None:
        model, ids, labels = with_labels(models.llama(), BODY)
        seen: set[nn.Module] = set()
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.add(module))
        ours(model, ids, labels)
        handle.remove()
        assert model.lm_head in seen

    def test_a_subclass_and_a_forward_of_ones_own_are_called(self) -> None:
        model, ids, labels = with_labels(models.llama(), BODY)
        model.lm_head.__class__ = Doubling
        torch.testing.assert_close(ours(model, ids, labels), self.expected(model, ids, labels))
        model.lm_head.__class__ = nn.Linear
        model.lm_head.forward = lambda x: 3 * F.linear(x, model.lm_head.weight)
        torch.testing.assert_close(ours(model, ids, labels), self.expected(model, ids, labels))

    def test_a_parametrized_weight_is_computed(self) -> None:
        model, ids, labels = with_labels(models.llama(), BODY)
        nn.utils.parametrizations.weight_norm(model.lm_head)
        model.lm_head.requires_grad_(False)
        torch.testing.assert_close(ours(model, ids, labels), self.expected(model, ids, labels))


class TestNumItems:
    def test_the_sum_of_losses_is_divided_by_it(self) -> None:
        model, ids, labels = with_labels(models.llama(), BODY)
        count = int((labels[:, 1:] != -100).sum())
        expected = model(ids, labels=labels, num_items_in_batch=40).loss
        for number in (40, 40.0, torch.tensor(40), torch.tensor([40.0])):
            torch.testing.assert_close(ours(model, ids, labels, num_items=number), expected)
        assert torch.equal(ours(model, ids, labels, num_items=count), ours(model, ids, labels))

    def test_parts_of_unequal_numbers_of_labels_average_to_the_whole(self) -> None:
        model, ids, labels = with_labels(models.llama(), BODY)
        mean = int((labels[:, 1:] != -100).sum()) / 3
        parts = [ours(model, ids[i : i + 1], labels[i : i + 1], num_items=mean) for i in range(3)]
        torch.testing.assert_close(torch.stack(parts).mean(), ours(model, ids, labels))

    @pytest.mark.parametrize("number", [0, -1])
    def test_no_number_of_labels_is_refused(self, number: int) -> None:
        model, ids, labels = with_labels(models.llama(), BODY)
        with pytest.raises(ValueError, match=f"num_items={number} is no number of labels, of which there are 14 here"):
            ours(model, ids, labels, num_items=number)
        with pytest.raises(ValueError, match=r"num_items has shape \[2\]; it must be one number"):
            ours(model, ids, labels, num_items=torch.ones(2))


@pytest.mark.parametrize("lora", [BODY, {"target_modules": ["lm_head"]}])
@pytest.mark.parametrize("label", [models.VOCAB, -1])
def test_a_label_outside_the_vocabulary_is_named(lora: dict[str, Any], label: int) -> None:
    model, ids, labels = with_labels(models.llama(), lora)
    labels[1, 4] = label
    with pytest.raises(ValueError, match=f"label {label} is outside the vocabulary of 100"):
        ours(model, ids, labels)


def test_only_adapters_get_gradients() -> None:
    model, ids, labels = with_labels(models.llama(), BODY)
    ours(model, ids, labels).backward()
    adapters = {name for name, _ in named_adapter_parameters(model)}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == adapters
    ours(copy.deepcopy(model), ids, labels)  # nothing that cannot be copied stays behind


def test_the_output_of_a_model_in_the_place_of_its_hidden_states_is_refused_with_the_remedy() -> None:
    model, ids = models.llama(), models.token_ids(2, 8, seed=1)
    with pytest.raises(TypeError, match=r"a BaseModelOutputWithPast and must be a tensor: pass its .last_hidden_state"):
        linear_cross_entropy(model, model.model(ids), ids)
    with pytest.raises(ValueError, match="and not the LightningModule around it"):
        linear_cross_entropy(nn.ModuleDict({"model": model}), model.model(ids).last_hidden_state, ids)


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": models.VOCAB}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Bert": ("BertLMHeadModel", {"is_decoder": True}, "transform before its head"),
    "Roberta": ("RobertaForCausalLM", {"is_decoder": True}, "dense, layer_norm before its head"),
    "ModernBertDecoder": ("ModernBertDecoderForCausalLM", {}, "model_type='modernbert-decoder'"),
    "Electra": ("ElectraForCausalLM", {"is_decoder": True}, "model_type='electra'"),
    "Bart": ("BartForCausalLM", {"is_decoder": True}, "the decoder of an encoder, whose labels are not shifted"),
    "RecurrentGemma": ("RecurrentGemmaForCausalLM", {}, "logits_soft_cap=30.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_own_loss_is_another_is_refused(name: str) -> None:
    model_class, settings, reason = REFUSED[name]
    config = getattr(transformers, f"{name}Config")(**SMALL, **settings)
    model = getattr(transformers, model_class)(config).requires_grad_(False)
    ids = models.token_ids(2, 8)
    with pytest.raises(ValueError, match=f"{model_class} has {reason}, which this loss does not know"):
        linear_cross_entropy(model, torch.randn(2, 8, config.hidden_size), ids)


def test_the_head_of_a_language_model_inside_another_is_taken() -> None:
    model, ids, labels = with_labels(models.llama(), BODY)
    outer = Outer(model)
    torch.testing.assert_close(
        linear_cross_entropy(outer, model.model(ids).last_hidden_state, labels), model(ids, labels=labels).loss
    )


class Outer(nn.Module):
    """A model of several inputs, one of which goes to a language model."""

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.vision, self.language_model, self.config = nn.Linear(3, 4), language_model, language_model.config

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.language_model.get_output_embeddings()
        return head
