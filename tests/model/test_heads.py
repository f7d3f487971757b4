"""Heads that are new train whole: those that transformers adds for a task; the user's own are named."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject, load_peft, named_adapter_parameters, remove, save_peft
from lightning_lora.model.state import named_lora_layers, named_trained_whole
from lightning_lora.model.summary import summary
from lightning_lora.model.trained_base import is_new_head_task, new_heads
from tests import models
from tests.stored import stored_llama

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100}
SOUND = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "conv_dim": (16, 16),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 2,
    "classifier_proj_size": 16,
    "tdnn_dim": (16, 16, 16, 16, 48),
    "xvector_output_dim": 16,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "classifier_proj_size": 16,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
PERCEIVER = {"d_latents": 32, "d_model": 32, "num_latents": 4, "num_blocks": 1, "num_self_attends_per_block": 1}
RT_DETR = {"encoder_hidden_dim": 32, "d_model": 32, "num_queries": 5, "decoder_layers": 2, "encoder_ffn_dim": 32}

# what is new in a model of each kind: with a body of that name, without one, inside the body, of several modules, of
# parameters alone
HEADS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "RobertaForSequenceClassification": (TEXT, {"classifier"}),
    "EsmForSequenceClassification": ({**TEXT, "pad_token_id": 1}, {"classifier"}),
    "BertForMultipleChoice": (TEXT, {"classifier"}),
    "LlamaForTokenClassification": (TEXT, {"score"}),
    "LukeForEntityPairClassification": ({**TEXT, "entity_vocab_size": 9, "entity_emb_size": 8}, {"classifier"}),
    "ModernBertForSequenceClassification": ({**TEXT, "pad_token_id": 0}, {"head", "classifier"}),
    "TapasForQuestionAnswering": (
        TEXT,
        {"output_weights", "output_bias", "column_output_weights", "column_output_bias"},
    ),
    "T5ForQuestionAnswering": (T5, {"qa_outputs"}),
    "T5ForSequenceClassification": (T5, {"classification_head"}),
    "Wav2Vec2ForCTC": (SOUND, {"lm_head"}),
    "Wav2Vec2ForSequenceClassification": (
        {**SOUND, "use_weighted_layer_sum": True},
        {"projector", "classifier", "layer_weights"},
    ),
    "Wav2Vec2ForXVector": (SOUND, {"projector", "tdnn", "feature_extractor", "classifier", "objective"}),
    "WavLMForXVector": (SOUND, {"projector", "tdnn", "feature_extractor", "classifier", "objective"}),
    "WhisperForAudioClassification": (WHISPER, {"projector", "classifier"}),
    "PerceiverForSequenceClassification": (PERCEIVER, {"perceiver.decoder"}),
    "RTDetrForObjectDetection": (
        RT_DETR,
        {"model.decoder.class_embed", "model.enc_score_head", "model.denoising_class_embed"},
    ),
    "VisualBertForRegionToPhraseAlignment": (TEXT, {"attention"}),  # not "cls", whose decoder is the table of words
    "BertForMaskedLM": (TEXT, set()),
    "BertForPreTraining": (TEXT, set()),
    "LlamaForCausalLM": (TEXT, set()),
    "T5ForConditionalGeneration": (T5, set()),
    "Wav2Vec2ForPreTraining": (SOUND, set()),
    "GPT2DoubleHeadsModel": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100}, set()),
}

# tasks whose head comes with the checkpoint: it stays frozen, or is adapted, unless modules_to_save names it
COME_WITH_THE_CHECKPOINT = {
    "CausalLM", "MaskedLM", "ConditionalGeneration", "PreTraining", "Pretraining", "Generation", "VisionText2Text",
    "ProteinText2Text", "ProteinFolding", "MaskedImageModeling", "CausalImageModeling", "SpeechToText", "TextToSpeech",
    "SpeechToSpeech", "TextToText", "RNNT", "TDT", "BlockDiffusion", "ContrastiveLearning", "Retrieval",
    "ImageTextRetrieval", "ImageSegmentation", "KeypointDetection", "KeypointMatching", "OpticalFlow",
    "MultimodalAutoencoding", "ImageSuperResolution", "TextRecognition", "SceneTextRecognition", "TableRecognition",
    "Prediction", "Decision",
}  # fmt: skip


def build(name: str, settings: dict[str, Any]) -> nn.Module:
    cls: Any = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(cls.config_class(**settings)).eval()


def whole_modules(model: nn.Module) -> set[str]:
    injection: Any = model.lora_injection
    return set(injection.trained_whole)


@pytest.mark.parametrize("name", HEADS)
def test_the_heads_of_a_task_are_found(name: str) -> None:
    settings, expected = HEADS[name]
    assert set(new_heads(build(name, settings))) == expected


def test_every_task_of_the_installed_transformers_is_known() -> None:
    folder = Path(str(transformers.__file__)).parent / "models"
    tasks = {}
    for path in folder.glob("*/modeling_*.py"):
        for name in re.findall(r"^class (\w+For[A-Z]\w*)\(\w*(?:PreTrainedModel|For[A-Z]\w*)", path.read_text(), re.M):
            if not name.endswith("Output") and not name.startswith("AutoModel"):
                tasks[name] = re.search(r"For([A-Z]\w*)$", name)[1]  # type: ignore[index]
    assert len(tasks) > 700
    unknown = {
        name for name, task in tasks.items() if not is_new_head_task(name) and task not in COME_WITH_THE_CHECKPOINT
    }
    assert unknown == set()


@pytest.mark.parametrize(
    "targets",
    [["query", "value", "dense"], r".*(query|dense)", "all-linear", ["query", "out_proj"]],
    ids=str,
)
@pytest.mark.parametrize("name", ["RobertaForSequenceClassification", "EsmForSequenceClassification"])
def test_no_half_of_a_new_head_stays_as_it_was(name: str, targets: Any) -> None:
    model = inject(build(name, HEADS[name][0]), LoRAConfig(r=2, target_modules=targets)).train()
    before = {n: p.detach().clone() for n, p in model.classifier.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(models.token_ids(), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    assert set(before) == {"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"}
    assert all(not torch.equal(p, before[n]) for n, p in model.classifier.named_parameters())
    assert not any(name.startswith("classifier") for name in named_lora_layers(model))


@pytest.mark.parametrize(
    "build_model",
    [
        lambda: build("Wav2Vec2ForCTC", SOUND),
        lambda: build("WavLMForXVector", SOUND),
        lambda: build("WhisperForAudioClassification", WHISPER),
        lambda: build("RTDetrForObjectDetection", RT_DETR),
    ],
    ids=["ctc", "xvector", "whisper", "detector"],
)
def test_heads_of_other_kinds_train_whole_and_the_rest_is_frozen_or_adapted(build_model: Callable[[], Any]) -> None:
    model = inject(build_model(), LoRAConfig(r=2, target_modules=r".*(q_proj|v_proj|lm_head|classifier|projector)"))
    heads = whole_modules(model)
    assert heads == set(new_heads(build_model()))
    adapters = {name for name, _ in named_adapter_parameters(model)}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    inside = {n for n, _ in model.named_parameters() if any(n == h or n.startswith(f"{h}.") for h in heads)}
    assert trained == adapters | inside
    assert adapters.isdisjoint(inside)
    assert inside


def sound() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 2000, generator=torch.Generator().manual_seed(0))}


def give_values(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("name", ["Wav2Vec2ForCTC", "Wav2Vec2ForXVector", "Wav2Vec2ForSequenceClassification"])
def test_peft_and_we_read_the_heads_of_models_of_sound(name: str, tmp_path: Path) -> None:
    # XVector's "feature_extractor" is also the end of the name of the frozen body's, and its "tdnn" a list
    model: Any = inject(build(name, SOUND), LoRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
    give_values(model)
    save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(name, SOUND), tmp_path).eval()
    ours: Any = load_peft(build(name, SOUND), tmp_path)
    ours.eval()
    close = {"rtol": 1e-5, "atol": 1e-6}  # another order of float32 operations in the adapter's term
    torch.testing.assert_close(theirs(**sound()).logits, model(**sound()).logits, **close)
    assert torch.equal(ours(**sound()).logits, model(**sound()).logits)
    assert set(named_trained_whole(ours)) == set(named_trained_whole(model))


def test_a_parameter_of_the_model_itself_trains_in_a_wider_dtype_than_the_base() -> None:
    name, cls = "Wav2Vec2ForSequenceClassification", transformers.Wav2Vec2ForSequenceClassification
    plain: Any = build(name, HEADS[name][0]).bfloat16()
    inputs = {key: value.bfloat16() for key, value in sound().items()}
    model: Any = inject(build(name, HEADS[name][0]).bfloat16(), LoRAConfig(r=2, target_modules=["q_proj"]))
    assert isinstance(model, cls)
    assert type(model).__name__ == name
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=0, atol=0)
    model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    (weights,) = [p for n, p in model.named_parameters() if n == "layer_weights"]
    assert weights.dtype == weights.grad.dtype == torch.float32
    remove(model)
    assert type(model) is cls
    assert model.layer_weights.dtype == torch.bfloat16


def test_a_directory_is_refused_for_a_parameter_that_trains_and_is_in_no_module(tmp_path: Path) -> None:
    model = inject(build("TapasForQuestionAnswering", TEXT), LoRAConfig(r=2, target_modules=["query"]))
    assert {"output_weights", "column_output_bias"} <= set(named_trained_whole(model))
    with pytest.raises(ValueError, match="'output_weights' trains whole, and PEFT trains only modules"):
        save_peft(model, tmp_path)


def test_the_head_of_a_model_inside_the_users_module_trains() -> None:
    net = nn.ModuleDict({"bert": models.bert_classifier(), "extra": nn.Linear(3, 3)})
    inject(net, LoRAConfig(r=2, target_modules=["query", "dense"]))
    assert set(named_trained_whole(net)) == {"bert.classifier.weight", "bert.classifier.bias"}


def resnet_like() -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    stages = {f"layer{i}": nn.Sequential(block(), block()) for i in range(3)}
    return nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 3), **stages, "fc": nn.Linear(4, 2)})


def recurrent() -> nn.Module:
    return nn.ModuleDict({"lstm": nn.LSTM(4, 4), "gate": nn.Linear(4, 4), "out": nn.Linear(4, 2)})


def with_own_head() -> nn.Module:
    body = models.bert_classifier().bert
    body.my_head = nn.Linear(32, 2)
    return body


def in_bitsandbytes() -> nn.Module:
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles kernels for odd shapes
        return stored_llama("bnb-nf4")


MAYBE_NEW: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str | None]] = {
    "convolutions": (resnet_like, {"target_modules": ["layer1.0.0"]}, "'fc' (frozen)"),
    "a last layer that is adapted": (resnet_like, {"target_modules": ["layer1.0.0", "fc"]}, "'fc' (adapted)"),
    "recurrent": (recurrent, {"target_modules": ["gate"]}, "'out' (frozen)"),
    "one that trains": (recurrent, {"target_modules": ["gate"], "modules_to_save": ["out"]}, None),
    "a head put on a transformers model": (with_own_head, {"target_modules": ["query"]}, "'my_head' (frozen)"),
    "and adapted": (with_own_head, {}, "'my_head' (adapted)"),
    "transformers alone": (models.llama, {}, None),
    "in bitsandbytes' layers": (in_bitsandbytes, {}, None),
    "with its own head": (models.bert_classifier, {}, None),
}


@pytest.mark.parametrize("case", MAYBE_NEW)
def test_the_first_line_names_what_may_be_a_new_head(case: str) -> None:
    build_model, settings, expected = MAYBE_NEW[case]
    model = inject(build_model(), LoRAConfig(r=1, **settings))
    text = summary(model, "", model)
    assert ("may be new" in text) == (expected is not None)
    if expected is not None:
        name = expected.split("'")[1]
        assert f"{expected} may be new" in text
        assert f"modules_to_save=[{name!r}]" in text
