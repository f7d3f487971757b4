"""What a tensor of a PEFT file is, told by its key."""

import pytest

from lightning_lora.peft.layout import parse_key

KEYS = {
    "q.lora_A.weight": ("A", "q"),
    "q.lora_B.weight": ("B", "q"),
    "q.lora_B.bias": ("bias", "q"),
    "q.lora_magnitude_vector": ("magnitude", "q"),
    "embed.lora_embedding_A": ("A", "embed"),
    "embed.lora_embedding_B": ("B", "embed"),
    "embed.token_adapter.trainable_tokens_delta": ("rows", "embed"),
    "embed.base_layer.weight": ("base", "embed.weight"),
    "q.base_layer.bias": ("trained", "q.bias"),
    "head.weight": ("trained", "head.weight"),
    "mlp.experts.base_layer.lora_A.weight": ("A", "mlp.experts.base_layer"),
    "mha.base_layer.out_proj.lora_B.weight": ("B", "mha.base_layer.out_proj"),
    "_orig_mod.q.lora_A.weight": ("A", "q"),
    "q.lora_A": ("variant", "q"),
    "q.lora_E": ("E", "q"),
    "q.lora_E.weight": ("variant", "q"),
    "embed.lora_embedding_A.weight": ("variant", "embed"),
}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_tells_the_kind_of_its_tensor_and_its_layer(key: str) -> None:
    found = parse_key(f"base_model.model.{key}")
    assert (found.kind, found.name, found.plain) == (*KEYS[key], f"base_model.model.{key}")
    assert parse_key(key)[:2] == KEYS[key]  # some tools leave PEFT's prefix out


@pytest.mark.parametrize(
    ("key", "plain", "kind"),
    [
        ("q.lora_A.default.weight", "q.lora_A.weight", "A"),
        ("q.lora_B.my_adapter.bias", "q.lora_B.bias", "bias"),
        ("q.lora_magnitude_vector.default.weight", "q.lora_magnitude_vector.weight", "magnitude"),
        ("embed.lora_embedding_B.default", "embed.lora_embedding_B", "B"),
        ("embed.token_adapter.trainable_tokens_delta.default", "embed.token_adapter.trainable_tokens_delta", "rows"),
    ],
)
def test_an_adapters_name_in_a_key_is_left_out(key: str, plain: str, kind: str) -> None:
    assert parse_key(key) == (kind, key.split(".")[0], plain)
