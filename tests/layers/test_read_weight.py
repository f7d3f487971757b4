"""Layers whose weight other modules read: a search for all of them in transformers and torch, and what each kind does."""

import copy
import pickle
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call

from lightning_lora import LoRAConfig, inject, merge, merged, remove
from lightning_lora.layers.read_weight import READERS
from lightning_lora.model.state import named_lora_layers
from tests import models
from tests.weight_readers import Read, reads

# what the search finds beside the table, and why it needs no entry there
ELSEWHERE = {
    # handed over by another class, which is in the table with the layer's name in it
    ("DebertaLMPredictionHead", "word_embeddings"): "DebertaForMaskedLM",
    ("DebertaV2LMPredictionHead", "word_embeddings"): "DebertaV2ForMaskedLM",
    ("PerceiverEmbeddingDecoder", "embedding_layer"): "PerceiverForMaskedLM",
    ("OneFormerTransformerDecoder", "query_embedder"): "OneFormerTransformerModule",
    ("Gemma3nTextAltUp", "prediction_coefs"): "clamped in place, and then called",
    ("RelativePositionBiasBase", "new_bias"): "a table that is made there",
    # scaled in place in eval mode: refused by check_rescaled
    ("RwkvModel", "block.attention.output"): "refused",
    ("RwkvModel", "block.feed_forward.value"): "refused",
    ("RwkvModel", "target_layer"): "refused",
}
# entries of the table whose reader gets the layer as an argument, or from a model that its code does not name
HANDED_OVER = {
    ("DebertaForMaskedLM", "deberta.embeddings.word_embeddings"),
    ("DebertaV2ForMaskedLM", "deberta.embeddings.word_embeddings"),
    ("PerceiverForMaskedLM", "perceiver.input_preprocessor.embeddings"),
}
# torch's own: its attention reads out_proj by the layer's class, its encoders' fused paths are switched off
TORCH = {"MultiheadAttention", "TransformerEncoder", "TransformerEncoderLayer", "SyncBatchNorm"}


def in_table(read: Read) -> bool:
    return any(fnmatchcase(read.path, name) and read.owner in classes for name, classes in READERS.items())


@pytest.fixture(scope="module")
def found() -> set[Read]:
    root = Path(transformers.__file__).parent
    return reads(root, "modeling_*.py") | reads(root / "generation", "*.py") | reads(root / "loss", "*.py")


def test_whatever_transformers_reads_is_served_or_refused(found: set[Read]) -> None:
    unknown = [read for read in sorted(found) if not in_table(read) and (read.owner, read.path) not in ELSEWHERE]
    assert not unknown, "add these to READERS in layers/read_weight.py, or say here why not"
    assert len(found) > 190  # the search itself finds something


def test_whatever_torch_reads_is_served_or_kept_off() -> None:
    found = reads(Path(torch.__file__).parent / "nn" / "modules", "*.py")
    assert {read.owner for read in found if not in_table(read)} == TORCH


def test_the_table_names_nothing_that_is_not_read(found: set[Read]) -> None:
    known = {(read.owner, read.path) for read in found} | HANDED_OVER | {("LinearCrossEntropyLoss", "linear")}
    stale = [(owner, name) for name, owners in READERS.items() for owner in owners if (owner, name) not in known]
    assert not stale


def test_the_search_sees_every_way_to_read(tmp_path: Path) -> None:
    code = """
class Parent(nn.Module):
    def __init__(self):
        self.a = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)
        self.b = nn.Linear(2, 2)
        self.c = nn.ModuleList([nn.Embedding(2, 2)])
        self.d = Own(2, 2)
        self.e = nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.ones(2))
    def forward(self, x, other):
        kernel = self.b.weight
        y = F.linear(x, kernel) + self.c[0].weight[:, 1] + getattr(self.d, "weight") @ x
        y = y.to(self.e.weight.dtype) * self.weight + self.norm.weight
        return torch.matmul(y, other.weight)
class Own(nn.Linear):
    pass
def project(layer, x):
    return x @ layer.weight.t()
"""
    (tmp_path / "modeling_own.py").write_text(code)
    assert {(read.path, read.kind) for read in reads(tmp_path, "modeling_*.py")} == {
        ("b", "linear"),
        ("c.*", "embedding"),
        ("d", "linear"),
        ("other", "unknown"),
        ("layer", "unknown"),
    }


# what is served


def tdnn() -> nn.Module:
    from transformers.models.wav2vec2.modeling_wav2vec2 import TDNNLayer

    config = transformers.Wav2Vec2Config(tdnn_dim=[8, 8], tdnn_kernel=[3, 3], tdnn_dilation=[1, 1])
    return TDNNLayer(config, 1)


def detr_map() -> nn.Module:
    from transformers.models.detr.modeling_detr import DetrMHAttentionMap

    return DetrMHAttentionMap(8, 2)


def reformer() -> nn.Module:
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = transformers.ReformerConfig(
        hidden_size=8, num_attention_heads=2, attention_head_size=4, num_buckets=2, is_decoder=True
    )
    return LSHSelfAttention(config)


def bloom() -> nn.Module:
    from transformers.models.bloom.modeling_bloom import BloomMLP

    return BloomMLP(transformers.BloomConfig(hidden_size=8, n_head=2, pretraining_tp=2, slow_but_exact=True))


def deberta() -> nn.Module:
    return transformers.DebertaForMaskedLM(
        transformers.DebertaConfig(
            vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, legacy=False
        )
    )


def sam_prompts() -> nn.Module:
    config = transformers.SamConfig(
        prompt_encoder_config={"hidden_size": 8, "image_size": 16, "patch_size": 4}, vision_config={"num_pos_feats": 4}
    )
    from transformers.models.sam.modeling_sam import SamPromptEncoder

    return SamPromptEncoder(config)


def layoutlm() -> nn.Module:
    return transformers.LayoutLMv3Model(
        transformers.LayoutLMv3Config(
            vocab_size=32, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            visual_embed=False, coordinate_size=2, shape_size=2,
        )
    )  # fmt: skip


class Scaled(nn.Module):
    """Gemma's embedding, looked up and read."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

        self.embed_tokens = Gemma3TextScaledWordEmbedding(16, 8, 0, embed_scale=3.0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed_tokens(ids) @ self.embed_tokens.weight.t()


class Gemma4TextModel(Scaled):
    """Named as the class that reads this table."""


X = torch.linspace(-1, 1, 96, dtype=torch.float64).view(2, 6, 8)
IMAGE = torch.linspace(0, 1, 8 * 16, dtype=torch.float64).view(1, 8, 4, 4)
IDS = torch.arange(1, 13).view(2, 6)  # without padding
Call = Callable[[nn.Module], Tensor]
CASES: dict[str, tuple[Callable[[], nn.Module], list[str], Call]] = {
    "tdnn": (tdnn, ["kernel"], lambda model: model(X)),
    "detr": (detr_map, ["q_linear", "q_proj", "k_proj"], lambda model: model(X, IMAGE.expand(2, -1, -1, -1))),
    "reformer": (reformer, ["query_key", "value"], lambda model: model._query_per_attn_head(X[:, None, :1])),
    "bloom": (bloom, ["dense_4h_to_h"], lambda model: model(X, X)),
    "deberta": (
        deberta,
        ["in_proj", "word_embeddings"],
        lambda model: model(input_ids=IDS).logits,
    ),
    "sam": (
        sam_prompts,
        [f"point_embed.{n}" for n in range(4)] + ["not_a_point_embed", "no_mask_embed"],
        lambda model: torch.cat(
            [
                model(
                    input_points=X[:1, None, :3, :2],
                    input_labels=torch.tensor([[[-1, 0, 1]]]),
                    input_boxes=None,
                    input_masks=None,
                )[0].flatten(),
                model(input_points=None, input_labels=None, input_boxes=X[:1, :3, :4], input_masks=None)[1].flatten(),
            ]
        ),
    ),
    "scaled": (Gemma4TextModel, ["embed_tokens"], lambda model: model(IDS)),
}


def built(case: str, **options) -> tuple[nn.Module, nn.Module, Call]:
    build, targets, call = CASES[case]
    torch.manual_seed(0)
    base = build().eval().double()
    model = copy.deepcopy(base)
    targets = [name for name in targets if any(n.endswith(name) for n, _ in base.named_modules())]
    inject(model, LoRAConfig(r=1, target_modules=targets, adapter_dtype="auto", **options))
    models.fill_adapters(model)
    return base, model, call


class Called(nn.Module):
    """A model whose forward is a function of it, so that functional_call can run it."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self) -> Tensor:
        return self.call(self.model)


@pytest.mark.parametrize("case", CASES)
def test_a_weight_that_is_read_has_the_adapter_in_it_and_gives_it_gradients(case: str) -> None:
    base, model, call = built(case)
    layers = named_lora_layers(model)
    weights = {
        f"model.{name}.weight": layer.base_weight + layer.from_matrix(layer.lora_B @ layer.lora_A * layer.lora_scaling)
        for name, layer in layers.items()
    }
    expected, output = functional_call(Called(base, call), weights, ()), call(model)
    assert not torch.allclose(expected, call(base))
    torch.testing.assert_close(output, expected)
    adapters = [p for layer in layers.values() for _, p in layer.named_adapter_tensors()]
    wanted = torch.autograd.grad(expected.square().sum(), adapters, allow_unused=True)
    given = torch.autograd.grad(output.square().sum(), adapters, allow_unused=True)
    assert any(grad is not None for grad in wanted)
    for own, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(own, other)
    with merged(model):
        torch.testing.assert_close(call(model), expected)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init": "pissa"}, {"dropout": 0.5}], ids=str)
@pytest.mark.parametrize("case", ["tdnn", "bloom"])
def test_a_read_weight_with_another_kind_of_adapter_equals_the_merged_one(case: str, options: dict) -> None:
    _, model, call = built(case, **options)
    output = call(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(call(twin), output)
    torch.testing.assert_close(call(merge(model)), output)


def test_what_is_called_beside_being_read_keeps_its_dropout() -> None:
    _, model, _ = built("bloom", dropout=0.5)
    layer = named_lora_layers(model)["dense_4h_to_h"]
    x = torch.ones(4, 32, dtype=torch.float64)
    assert not torch.equal(model.train() and layer(x), layer(x))
    assert torch.equal(model.eval() and layer(x), layer(x))


def test_a_table_that_is_read_without_gradients_has_the_adapter_in_it() -> None:
    torch.manual_seed(0)
    model = inject(layoutlm().eval(), LoRAConfig(r=2, target_modules=["rel_pos_bias", "rel_pos_x_bias"]))
    with torch.no_grad():
        before = model(input_ids=IDS).last_hidden_state
        models.fill_adapters(model, std=2.0)
        output = model(input_ids=IDS).last_hidden_state
        assert not torch.allclose(before, output)
        with merged(model):
            torch.testing.assert_close(model(input_ids=IDS).last_hidden_state, output)


def test_reformer_generates_with_its_cache_as_without() -> None:
    torch.manual_seed(0)
    config = transformers.ReformerConfig(
        attn_layers=["lsh"], hidden_size=8, num_attention_heads=2, attention_head_size=4, feed_forward_size=16,
        num_buckets=2, is_decoder=True, vocab_size=32, axial_pos_shape=[4, 4], axial_pos_embds_dim=[4, 4],
        lsh_attn_chunk_length=4, eos_token_id=None, hash_seed=0,
    )  # fmt: skip
    model = inject(transformers.ReformerModelWithLMHead(config).eval(), LoRAConfig(r=2))
    models.fill_adapters(model)
    ids = torch.arange(9)[None]

    def last_logits() -> Tensor:
        cache = model(ids[:, :8], use_cache=True).past_buckets_states
        return model(ids[:, 8:], past_buckets_states=cache, use_cache=True).logits

    with torch.no_grad():
        output = last_logits()
        with merged(model):
            torch.testing.assert_close(output, last_logits(), rtol=1e-4, atol=1e-5)


def test_rows_of_a_table_that_a_head_reads_train_there_too() -> None:
    torch.manual_seed(0)
    model = deberta().eval()
    inject(model, LoRAConfig(r=2, target_modules=["in_proj"], trainable_token_indices={"word_embeddings": [3, 20]}))
    with torch.no_grad():
        model.deberta.embeddings.word_embeddings.lora_rows.mul_(2).add_(1)
    output = model(input_ids=IDS).logits
    (grad,) = torch.autograd.grad(output[..., 20].sum(), model.deberta.embeddings.word_embeddings.lora_rows)
    assert grad[1].abs().sum() > 0  # no input is 20
    with merged(model):
        torch.testing.assert_close(model(input_ids=IDS).logits, output)


def test_remove_gives_a_read_layer_back() -> None:
    base, model, call = built("detr")
    assert torch.equal(call(remove(model)), call(base))
    assert isinstance(model.k_proj.weight, nn.Parameter)


# what is refused


def test_a_convolution_whose_weight_is_read_is_refused_by_name() -> None:
    config = transformers.MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=32)
    model = transformers.MambaForCausalLM(config)
    with pytest.raises(ValueError, match=r"mixer.conv1d' cannot be adapted: MambaMixer reads its weight.*exclude_mod"):
        inject(model, LoRAConfig(r=2, target_modules=["conv1d", "in_proj"]))
    inject(model, LoRAConfig(r=2, target_modules=["conv1d", "in_proj"], exclude_modules=["conv1d"]))


def test_a_bias_beside_a_weight_that_is_read_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"'kernel' cannot be adapted with lora_bias=True: a module around it reads its weight"
    ):
        inject(tdnn(), LoRAConfig(r=2, target_modules=["kernel"], lora_bias=True))


def test_a_weight_that_is_rescaled_in_eval_mode_is_refused_by_name() -> None:
    config = transformers.RwkvConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=3, rescale_every=1, attention_hidden_size=8
    )
    torch.manual_seed(0)
    model = transformers.RwkvForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"'rwkv.blocks.1.attention.output' cannot be adapted: .*rescale_every = 0"):
        inject(model, LoRAConfig(r=2))
    ids = torch.arange(6)[None]
    model.config.rescale_every = 0
    model = inject(model, LoRAConfig(r=2))
    models.fill_adapters(model)
    with torch.no_grad():
        output = model(ids).logits
        with merged(model):
            torch.testing.assert_close(model(ids).logits, output)
