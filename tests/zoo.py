"""Tiny random models of many families, built from configs: nothing is downloaded, and every build is the same."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.models import VOCAB, token_ids

HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**HEADS, "intermediate_size": 64, "vocab_size": VOCAB, "max_position_embeddings": 32}
GROUPED = {**DECODER, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2}
SPEECH = {
    **HEADS,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
}


@dataclass(frozen=True)
class Family:
    """A model, what it is called with, and what of its output is compared.

    Attributes:
        output: picks the tensor out of what the model returns.
        unreached: ends of the names of the linear layers that this forward does not go through.
        refused: ends of the names of the linear layers that PEFT refuses to adapt, by the model's type.
        only_theirs: ends of the names of what PEFT's "all-linear" means besides: experts and routers that are
            parameters, which it adapts as ``target_parameters``.
        towers: names of the parts beside the language model, which our "all-linear" leaves out.
        read: ends of the names of the linear layers whose weight their parent reads instead of calling them: PEFT's
            adapters have no effect there.
        only_ours: ends of the names of the layers that it then leaves out, since they are called as experts once were.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    output: Callable[[Any], Tensor]
    unreached: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    only_theirs: tuple[str, ...] = ()
    only_ours: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()


def logits(output: Any) -> Tensor:
    return output.logits


def last_hidden_state(output: Any) -> Tensor:
    return output.last_hidden_state


def whole(output: Any) -> Tensor:
    return output


def ids() -> dict[str, Tensor]:
    return {"input_ids": token_ids()}


def ids_both() -> dict[str, Tensor]:
    return {"input_ids": token_ids(), "decoder_input_ids": token_ids(2, 5, seed=1)}


def pixels(size: int = 32) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": noise(2, 3, size, size)}


def sound() -> dict[str, Tensor]:
    return {"input_values": noise(2, 400)}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def family(
    name: str,
    cls: str,
    inputs: Callable[[], dict[str, Tensor]] = ids,
    output: Callable[[Any], Tensor] = logits,
    *,
    unreached: tuple[str, ...] = (),
    refused: tuple[str, ...] = (),
    only_theirs: tuple[str, ...] = (),
    only_ours: tuple[str, ...] = (),
    read: tuple[str, ...] = (),
    towers: tuple[str, ...] = (),
    **settings: Any,
) -> Family:
    """Return a family of transformers; model code is imported when it is first built."""

    def make() -> nn.Module:
        model_class = getattr(transformers, cls)
        return model_class(model_class.config_class(**settings))

    return Family(name, lambda: seeded(make), inputs, output, unreached, refused, only_theirs, only_ours, read, towers)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().float().eval()


class ConvNet(nn.Module):
    """Convolutions of several kinds, batch normalisation, and a linear head as torchvision builds them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=2, dilation=2),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Linear(32, 10))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.features(pixel_values).mean((2, 3)))


class CrossAttention(nn.Module):
    """Attention with the layer names of diffusers."""

    def __init__(self, channels: int, context: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out[1](self.to_out[0](y.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """A residual convolution block that is told the time, and looks at the context."""

    def __init__(self, inputs: int, outputs: int, time: int, context: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, outputs)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1)
        self.attn2 = CrossAttention(outputs, context)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        h = self.conv1(nn.functional.silu(self.norm1(x))) + self.time_emb_proj(time)[..., None, None]
        h = self.conv2(nn.functional.silu(self.norm2(h))) + self.conv_shortcut(x)
        tokens = h.flatten(2).transpose(1, 2)
        return h + self.attn2(tokens, context).transpose(1, 2).unflatten(2, h.shape[2:])


class UNet(nn.Module):
    """The shape of a diffusion UNet: down, middle and up blocks with skips, told a time and a context."""

    def __init__(self, time: int = 32, context: int = 24) -> None:
        super().__init__()
        self.time_embedding = nn.Sequential(nn.Linear(8, time), nn.SiLU(), nn.Linear(time, time))
        self.conv_in = nn.Conv2d(4, 16, 3, padding=1)
        self.down_blocks = nn.ModuleList([Block(16, 16, time, context), Block(16, 32, time, context)])
        self.downsamplers = nn.ModuleList([nn.Conv2d(n, n, 3, stride=2, padding=1) for n in (16, 32)])
        self.mid_block = Block(32, 32, time, context)
        self.upsamplers = nn.ModuleList([nn.ConvTranspose2d(n, n, 2, stride=2) for n in (32, 32)])
        self.up_blocks = nn.ModuleList([Block(64, 32, time, context), Block(48, 16, time, context)])
        self.conv_out = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        angles = timestep[:, None] * 10.0 ** -torch.arange(4)
        time = self.time_embedding(torch.cat([angles.sin(), angles.cos()], -1))
        x, skips = self.conv_in(sample), []
        for block, down in zip(self.down_blocks, self.downsamplers, strict=True):
            skips.append(block(x, time, encoder_hidden_states))
            x = down(skips[-1])
        x = self.mid_block(x, time, encoder_hidden_states)
        for up, block in zip(self.upsamplers, self.up_blocks, strict=True):
            x = block(torch.cat([up(x), skips.pop()], 1), time, encoder_hidden_states)
        return self.conv_out(x)


def unet_inputs() -> dict[str, Tensor]:
    return {
        "sample": noise(2, 4, 8, 8),
        "timestep": torch.tensor([3.0, 500.0]),
        "encoder_hidden_states": noise(2, 5, 24),
    }


BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": VOCAB,
}
VISION = {**HEADS, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
ROUTED = ("mlp.experts", "mlp.experts.base_layer", "mlp.gate")
MLP = ("gate_proj", "up_proj", "down_proj")

FAMILIES = [
    # decoders
    family("llama", "LlamaForCausalLM", **GROUPED),
    family("mistral", "MistralForCausalLM", **GROUPED, sliding_window=4),
    family("qwen2", "Qwen2ForCausalLM", **DECODER, num_key_value_heads=2),
    family("qwen3", "Qwen3ForCausalLM", **GROUPED),
    family("gemma2", "Gemma2ForCausalLM", **GROUPED),
    family("gemma3", "Gemma3ForCausalLM", **GROUPED),
    family("phi3", "Phi3ForCausalLM", **DECODER, num_key_value_heads=2, pad_token_id=0),
    family("gpt2", "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=32),
    family("opt", "OPTForCausalLM", **HEADS, ffn_dim=64, vocab_size=VOCAB, word_embed_proj_dim=16),
    family("gpt_neox", "GPTNeoXForCausalLM", **DECODER),
    family("falcon", "FalconForCausalLM", **HEADS, vocab_size=VOCAB),
    family("bloom", "BloomForCausalLM", hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCAB),
    # mixtures of experts: most experts are parameters of three dimensions, not layers
    family("mixtral", "MixtralForCausalLM", **EXPERTS, num_local_experts=4, only_theirs=ROUTED),
    family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        **EXPERTS,
        num_experts=4,
        moe_intermediate_size=16,
        only_theirs=ROUTED,
    ),
    family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        **DECODER,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
    ),
    family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        **DECODER,
        num_key_value_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        only_theirs=ROUTED,
        only_ours=MLP,
    ),
    family("gpt_oss", "GptOssForCausalLM", **EXPERTS, num_local_experts=4),
    # state space
    family(
        "mamba",
        "MambaForCausalLM",
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        vocab_size=VOCAB,
        refused=("out_proj",),
        read=("dt_proj",),
    ),
    family(
        "mamba2",
        "Mamba2ForCausalLM",
        hidden_size=32,
        num_heads=4,
        head_dim=16,
        n_groups=1,
        state_size=8,
        num_hidden_layers=2,
        vocab_size=VOCAB,
        refused=("out_proj",),
    ),
    # encoders
    family("bert", "BertForMaskedLM", **DECODER),
    family("roberta", "RobertaForMaskedLM", **DECODER),
    family("distilbert", "DistilBertForMaskedLM", dim=32, hidden_dim=64, n_layers=2, n_heads=4, vocab_size=VOCAB),
    family("albert", "AlbertForMaskedLM", **DECODER, embedding_size=16),
    family("deberta", "DebertaForMaskedLM", **DECODER, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    family("deberta_v2", "DebertaV2ForMaskedLM", **DECODER, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    family(
        "mobilebert",
        "MobileBertForMaskedLM",
        **DECODER,
        embedding_size=16,
        intra_bottleneck_size=16,
        read=("predictions.dense",),
    ),
    family("modernbert", "ModernBertForMaskedLM", **DECODER, pad_token_id=0),
    # encoder-decoders
    family(
        "t5",
        "T5ForConditionalGeneration",
        ids_both,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCAB,
    ),
    family("bart", "BartForConditionalGeneration", ids_both, **BART, max_position_embeddings=32),
    family(
        "led",
        "LEDForConditionalGeneration",
        ids_both,
        **BART,
        max_encoder_position_embeddings=32,
        max_decoder_position_embeddings=32,
        attention_window=4,
        unreached=("query_global", "key_global", "value_global"),
    ),
    # speech
    family(
        "whisper",
        "WhisperForConditionalGeneration",
        lambda: {"input_features": noise(2, 8, 40), "decoder_input_ids": token_ids()},
        **BART,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=32,
        pad_token_id=0,
    ),
    family("wav2vec2", "Wav2Vec2ForCTC", sound, **SPEECH),
    family("hubert", "HubertModel", sound, last_hidden_state, **SPEECH),
    family("wavlm", "WavLMModel", sound, last_hidden_state, **SPEECH, read=("q_proj", "k_proj", "v_proj", "out_proj")),
    # vision
    family("vit", "ViTModel", pixels(), last_hidden_state, **VISION, unreached=("pooler.dense",)),
    family("dinov2", "Dinov2Model", pixels(), last_hidden_state, **VISION),
    family(
        "swin",
        "SwinModel",
        pixels(),
        last_hidden_state,
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    family(
        "convnext",
        "ConvNextModel",
        pixels(),
        last_hidden_state,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_stages=2,
        layer_scale_init_value=0.5,
    ),
    # text and vision
    family(
        "clip",
        "CLIPModel",
        lambda: {**ids(), **pixels()()},
        lambda output: output.logits_per_image,
        text_config=DECODER,
        vision_config=VISION,
        projection_dim=16,
    ),
    family(
        "llava",
        "LlavaForConditionalGeneration",
        lambda: {"input_ids": torch.cat([torch.full((2, 16), VOCAB), token_ids()], 1), **pixels()()},
        text_config={**GROUPED, "model_type": "llama", "vocab_size": VOCAB + 1},
        vision_config={**VISION, "model_type": "clip_vision_model"},
        vision_feature_layer=-1,
        image_token_id=VOCAB,
        towers=("model.vision_tower", "model.multi_modal_projector"),
    ),
    # hand-written
    Family("conv_net", lambda: seeded(ConvNet), pixels(16), whole),
    Family("unet", lambda: seeded(UNet), unet_inputs, whole),
]


def named(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)
