"""Adapt layers whose weight other modules read and multiply by themselves: ``F.linear(x, self.k_proj.weight)``.

``tests/test_read_weight.py`` searches the code of all transformers models for such modules and compares with the table.
"""

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.stored import stored_form

# the names of layers, seen from the classes whose code reads their weight, on some path or on all
_READERS = {
    # linear layers
    "classifier": "LongcatFlashTopkRouter",
    "correction_coefs": "Gemma3nTextAltUp",
    "decoder": "MobileBertLMPredictionHead",
    "dense": "BloomAttention MobileBertLMPredictionHead",
    "dense_4h_to_h": "BloomMLP",
    "dt_proj": "FalconMambaMixer JambaMambaMixer MambaMixer",
    "in_proj": "DisentangledSelfAttention",
    "k_linear": "DabDetrMHAttentionMap",
    "k_proj": "ConditionalDetrMHAttentionMap DetrMHAttentionMap MaskFormerDetrMHAttentionMap WavLMAttention",
    "kernel": "TDNNLayer",
    "linear": "LinearCrossEntropyLoss",
    "lm_head": "Gemma4AssistantForCausalLM Gemma4UnifiedAssistantForCausalLM",
    "out_proj": (
        "BambaMixer FalconH1Mixer FalconMambaMixer GraniteMoeHybridMambaLayer Mamba2Mixer MambaMixer "
        "NemotronHMamba2Mixer WavLMAttention Zamba2MambaMixer"
    ),
    "q_proj": "WavLMAttention",
    "query_key": "LSHSelfAttention",
    "rel_pos_bias": "LayoutLMv2Encoder LayoutLMv3Encoder PPDocLayoutV2ReadingOrderEncoder",
    "rel_pos_x_bias": "LayoutLMv2Encoder LayoutLMv3Encoder",
    "rel_pos_y_bias": "LayoutLMv2Encoder LayoutLMv3Encoder",
    "unembedding_projection": "NeoMMEForMaskedLM",
    "v_proj": "WavLMAttention",
    "value": "LSHSelfAttention",
    "x_proj": "FalconMambaMixer MambaMixer",
    # convolutions
    "conv": "Lfm2MoeShortConv Lfm2ShortConv Lfm3ShortConv",
    "conv1d": (
        "BailingHybridDeltaAttention BambaMixer FalconH1Mixer FalconMambaMixer Glm5NextTextLinearAttention "
        "GraniteMoeHybridMambaLayer Inkling2ShortConvolution InklingShortConvolution JambaMambaMixer "
        "KimiLinearDeltaAttention Mamba2Mixer MambaMixer NemotronHMamba2Mixer OlmoHybridGatedDeltaNet "
        "Qwen3NextGatedDeltaNet Qwen3_5GatedDeltaNet Qwen3_5MoeGatedDeltaNet Qwen4ExpTextGatedDeltaNet "
        "Zamba2MambaMixer ZambaMambaMixer"
    ),
    "conv_1d": "RecurrentGemmaRecurrentBlock",
    # embeddings
    "cls_embed": "Sam3GeometryEncoder Sam3LiteTextGeometryEncoder",
    "codebook": "DacVectorQuantize",
    "conditional_detr.model.query_position_embeddings": "ConditionalDetrForSegmentation",
    "deberta.embeddings.word_embeddings": "DebertaForMaskedLM DebertaV2ForMaskedLM",
    "detr.model.query_position_embeddings": "DetrForSegmentation",
    "embed_positions": "AudioFlamingo3Encoder MossTranscribeDiarizeAudioModel Qwen2AudioEncoder VoxtralEncoder",
    "embed_tokens": "DiffusionGemmaDecoderModel Gemma4TextModel Qwen4ExpTextModel",
    "embedding": (
        "ChameleonVQVAEVectorQuantizer Emu3VQVAEVectorQuantizer GlmImageVQVAEVectorQuantizer JanusVQVAEVectorQuantizer"
    ),
    "hq_token": "SamHQMaskDecoder",
    "iou_token": (
        "EdgeTamMaskDecoder EdgeTamVideoMaskDecoder Sam2MaskDecoder Sam2VideoMaskDecoder Sam3TrackerMaskDecoder "
        "Sam3TrackerVideoMaskDecoder SamHQMaskDecoder SamMaskDecoder"
    ),
    "language_model.embed_tokens": "Gemma4Model",
    "level_embed": "Mask2FormerTransformerModule OneFormerTransformerModule",
    "mask_tokens": (
        "EdgeTamMaskDecoder EdgeTamVideoMaskDecoder Sam2MaskDecoder Sam2VideoMaskDecoder Sam3TrackerMaskDecoder "
        "Sam3TrackerVideoMaskDecoder SamHQMaskDecoder SamMaskDecoder"
    ),
    "ngram_embeddings": "ProphetNetDecoder",
    "no_mask_embed": (
        "EdgeTamPromptEncoder EdgeTamVideoPromptEncoder Sam2PromptEncoder Sam2VideoPromptEncoder "
        "Sam3TrackerPromptEncoder Sam3TrackerVideoPromptEncoder SamHQPromptEncoder SamPromptEncoder"
    ),
    "not_a_point_embed": (
        "EdgeTamPromptEncoder EdgeTamVideoPromptEncoder Sam2PromptEncoder Sam2VideoPromptEncoder "
        "Sam3TrackerPromptEncoder Sam3TrackerVideoPromptEncoder SamHQPromptEncoder SamPromptEncoder"
    ),
    "obj_score_token": (
        "EdgeTamMaskDecoder EdgeTamVideoMaskDecoder Sam2MaskDecoder Sam2VideoMaskDecoder Sam3TrackerMaskDecoder "
        "Sam3TrackerVideoMaskDecoder"
    ),
    "patterns": "DabDetrModel",
    "perceiver.input_preprocessor.embeddings": "PerceiverForMaskedLM",
    "point_embed": (
        "EdgeTamPromptEncoder EdgeTamVideoPromptEncoder Sam2PromptEncoder Sam2VideoPromptEncoder "
        "Sam3TrackerPromptEncoder Sam3TrackerVideoPromptEncoder"
    ),
    "point_embed.*": "SamHQPromptEncoder SamPromptEncoder",
    "position_embedding": (
        "AltCLIPVisionEmbeddings BridgeTowerVisionEmbeddings CLIPSegVisionEmbeddings CLIPVisionEmbeddings "
        "ChineseCLIPVisionEmbeddings Cosmos3EdgeVisionEmbeddings GitVisionEmbeddings Glm4vMoeVisionEmbeddings "
        "Glm4vVisionEmbeddings GlmImageVisionEmbeddings GraniteDoclingVisionEmbeddings HunYuanVLVisionPatchEmbed "
        "JanusVisionEmbeddings Kosmos2VisionEmbeddings MLCDVisionEmbeddings MetaClip2VisionEmbeddings "
        "OwlViTVisionEmbeddings Owlv2VisionEmbeddings Phi4MultimodalVisionEmbeddings Siglip2VisionEmbeddings "
        "SiglipVisionEmbeddings Step3p7VisionEmbeddings UnlimitedOcrVisionEmbeddings XCLIPVisionEmbeddings"
    ),
    "presence_token": "Sam3DetrDecoder Sam3LiteTextDetrDecoder",
    "prompt_ctx": "OneFormerTextMapper",
    "queries_embedder": "Mask2FormerTransformerModule MaskFormerTransformerModule OneFormerTransformerModule",
    "queries_features": "Mask2FormerTransformerModule",
    "query": "EomtDinov3ForUniversalSegmentation EomtForUniversalSegmentation VideomtForUniversalSegmentation",
    "query_1024_resolution": "DeepseekOcr2VisionModel",
    "query_768_resolution": "DeepseekOcr2VisionModel",
    "query_embed": "Sam3DetrDecoder Sam3LiteTextDetrDecoder",
    "query_feat": "LwDetrModel RfDetrModel",
    "query_position_embeddings": (
        "ConditionalDetrModel DeformableDetrModel DetrModel GroundingDinoModel MMGroundingDinoModel "
        "TableTransformerModel"
    ),
    "query_refpoint_embeddings": "DabDetrModel",
    "reference_point_embed": "LwDetrModel RfDetrModel",
    "reference_points": "GroundingDinoModel MMGroundingDinoModel Sam3DetrDecoder Sam3LiteTextDetrDecoder",
    "rel_embeddings": "DebertaEncoder DebertaV2Encoder SEWDTransformerEncoder",
    "relative_attention_bias": "RelativePositionBiasBase",
    "tgt_embed": "OmDetTurboDecoder",
}
READERS: dict[str, frozenset[str]] = {name: frozenset(classes.split()) for name, classes in _READERS.items()}


class ReadWeight(LoRALayer):
    """Mixin of an adapted layer whose ``weight`` reads as the effective weight, ``W + scaling * B A``.

    Modules and kernels that read it see the adapter, and A and B get their gradients. A call of the layer computes base
    and adapter apart, as in any other layer; only there has dropout an input to act on.
    """

    @classmethod
    @override
    def check(cls, layer: nn.Module) -> None:
        check_not_stored(layer)
        super().check(layer)

    def effective_weight(self) -> Tensor:
        """Return ``W + scaling * B A`` while the adapter is active, and else ``W``."""
        return self.merged() if self.reads_effective else self.base_weight

    weight: Any = property(effective_weight)  # a parameter in the base class

    @property
    @override
    def base_weight(self) -> Tensor:
        stored = self._parameters["weight"]
        assert stored is not None
        return stored

    @override
    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        stored: Any = object.__new__(self.lora_base_class)  # a view of this layer by which weight reads as it is stored
        object.__setattr__(stored, "__dict__", self.__dict__)
        return self.lora_base_class.forward(stored, *args, **kwargs)


def check_not_stored(layer: nn.Module) -> None:
    """Raise ``ValueError`` for a layer whose weight others read, and which is no plain tensor."""
    if stored_form(layer) is not None:
        raise ValueError(
            "a module around it reads its weight instead of calling it, which would leave the adapter out, and this "
            "weight is stored in another form, which cannot include it: load this layer unquantised"
        )


def reader_of(modules: Mapping[str, nn.Module], name: str) -> nn.Module | None:
    """Return the module around a layer that reads the layer's weight, if one is known to.

    Args:
        modules: of the whole model, by name.
        name: the layer's.
    """
    parts = name.split(".")
    for length in range(len(parts)):
        reader = modules.get(".".join(parts[:length]))
        if reader is not None and is_read_by(reader, ".".join(parts[length:])):
            return reader
    return None


def is_read_by(reader: nn.Module, name: str) -> bool:
    """Whether a module is known to read the weight of the layer that is called ``name`` inside it."""
    classes = {cls.__name__ for cls in type(reader).__mro__}
    return any(fnmatchcase(name, pattern) and not classes.isdisjoint(found) for pattern, found in READERS.items())


def check_rescaled(modules: Mapping[str, nn.Module], name: str) -> None:
    """Raise ``ValueError`` for a layer whose weight its model divides in eval mode, past the adapter (RWKV)."""
    for prefix, module in modules.items():
        config: Any = getattr(module, "config", None)
        if type(module).__name__ != "RwkvModel" or not config.rescale_every:
            continue
        inside = name.removeprefix(f"{prefix}." if prefix else "")
        found = re.fullmatch(r"blocks\.(\d+)\.(attention\.output|feed_forward\.value)", inside)
        if found is not None and int(found[1]) >= config.rescale_every:
            raise ValueError(
                f"{name!r} cannot be adapted: in eval mode {type(module).__name__} divides its weight by a power of "
                "two, for float16, and not the adapter's term. Set model.config.rescale_every = 0 before the model "
                "first runs, or leave the layer out with exclude_modules"
            )
