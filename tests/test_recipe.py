"""The Qwen3-4B recipe: its sizes on meta, its YAML, and the same script at a tiny size on two processes."""

import csv
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_lora import (
    FSDPLoRAStrategy,
    LoRACallback,
    LoRAConfig,
    MegatronLoRAStrategy,
    inject,
    load_peft,
    named_adapter_parameters,
    plan,
)
from lightning_lora.megatron.tensor_parallel import split
from lightning_lora.megatron.tp_plan import plan_of
from lightning_lora.ops.sharded import is_sharded, logical
from tests import models
from tests.distributed.launch import run, torchrun_variables

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 2560, 36, 32, 8, 128, 9728, 151936
# (out_features, in_features) of a block's linear layers, and the side that the plan splits
LINEARS = {
    "q_proj": (HEADS * HEAD_DIM, HIDDEN, 0),
    "k_proj": (KV_HEADS * HEAD_DIM, HIDDEN, 0),
    "v_proj": (KV_HEADS * HEAD_DIM, HIDDEN, 0),
    "o_proj": (HIDDEN, HEADS * HEAD_DIM, 1),
    "gate_proj": (INTERMEDIATE, HIDDEN, 0),
    "up_proj": (INTERMEDIATE, HIDDEN, 0),
    "down_proj": (HIDDEN, INTERMEDIATE, 1),
}


def imported(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def qwen3_4b() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM, intermediate_size=INTERMEDIATE, vocab_size=VOCAB, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return Qwen3ForCausalLM(config)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded tiny Qwen3 in several files, and a tokenizer that reads bytes and has a chat template."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sys.path.insert(0, str(EXAMPLES))
    try:
        tokenizer = imported("smollm2").byte_tokenizer()
    finally:
        sys.path.remove(str(EXAMPLES))
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    config = Qwen3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=258, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("qwen3")
    models._seeded(lambda: Qwen3ForCausalLM(config)).save_pretrained(directory, max_shard_size="50KB")
    tokenizer.save_pretrained(directory)
    assert (directory / "model.safetensors.index.json").exists()
    return directory


@pytest.fixture(scope="module")
def adapted_sizes() -> tuple[int, int]:
    model = inject(qwen3_4b(), LoRAConfig(r=8))
    adapters = sum(p.numel() for _, p in named_adapter_parameters(model))
    return adapters, sum(p.numel() for p in model.parameters()) - adapters


def test_the_adapter_has_the_size_of_the_design(adapted_sizes: tuple[int, int]) -> None:
    by_hand = LAYERS * 8 * sum(out + in_ for out, in_, _ in LINEARS.values())
    assert adapted_sizes[0] == by_hand == 16_515_072
    norms = LAYERS * (2 * HIDDEN + 2 * HEAD_DIM) + HIDDEN
    weights = LAYERS * sum(out * in_ for out, in_, _ in LINEARS.values())
    assert adapted_sizes[1] == weights + norms + VOCAB * HIDDEN == 4_022_468_096


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_linear_layer_is_split_by_two_four_and_eight(ranks: int) -> None:
    torch.distributed.init_process_group("fake", rank=ranks - 1, world_size=ranks, store=FakeStore())
    model = inject(qwen3_4b(), LoRAConfig(r=8))
    counts = split(model, plan_of(model, None), init_device_mesh("cpu", (ranks,)))
    assert counts == {"column": 5 * LAYERS + 1, "row": 2 * LAYERS, "summed": 2 * LAYERS, "vocabulary": 1}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            out, in_, dim = LINEARS[name.rpartition(".")[2]]
            part = [out, in_]
            part[dim] //= ranks
            assert list(layer.weight.shape) == part
            assert list(layer.lora_B.shape) == [part[0], 8]
            assert list(layer.lora_A.shape) == [8, part[1]]
            assert tuple(logical(layer.weight).shape) == (out, in_)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert list(model.lm_head.weight.shape) == [VOCAB // ranks, HIDDEN]
    whole = [name for name, p in model.named_parameters() if ".lora_" not in name and not is_sharded(p)]
    assert all("norm" in name for name in whole)


def test_the_yaml_makes_the_run_that_it_describes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = imported("qwen3_4b")
    settings = ["--trainer.accelerator=cpu", f"--model.base={base}"]
    arguments = [f"--config={EXAMPLES / 'qwen3_4b.yaml'}", *settings]
    monkeypatch.setattr(sys, "argv", ["qwen3_4b.py", *arguments])
    cli = recipe.CLI(recipe.CompletionWriter, recipe.Completions, run=False)
    strategy, trainer = cli.trainer.strategy, cli.trainer
    assert isinstance(strategy, MegatronLoRAStrategy)
    assert (strategy.tensor_parallel_size, trainer.num_devices, trainer.precision) == (2, 8, "bf16-mixed")
    assert trainer.gradient_clip_val == 1.0
    lora = next(callback for callback in trainer.callbacks if isinstance(callback, LoRACallback))
    assert lora.config == LoRAConfig(r=8)
    assert lora.save_peft
    assert cli.datamodule.tokenizer.name_or_path == str(base)


def test_the_70b_recipe_plans_a_base_of_35_gb(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    recipe = imported("qwen3_4b")
    settings = ["--trainer.accelerator=cpu", f"--model.base={base}"]
    monkeypatch.setattr(sys, "argv", ["qwen3_4b.py", f"--config={EXAMPLES / 'llama_70b.yaml'}", *settings])
    cli = recipe.CLI(recipe.CompletionWriter, recipe.Completions, run=False)
    assert isinstance(cli.trainer.strategy, FSDPLoRAStrategy)
    lora = next(callback for callback in cli.trainer.callbacks if isinstance(callback, LoRACallback))
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    decided = plan(model, lora.config, quantize="nf4-dq")
    print(decided)
    line = "base in nf4-dq: 560 linear layers, 136,902.1 -> 35,311.8 MB; as before: lm_head (output head)"
    assert line in capsys.readouterr().out
    weights = 80 * (8192 * (8192 + 1024 + 1024 + 8192) + 3 * 8192 * 28672)
    scales = weights // 64
    assert decided.quantization.bytes_before == 2 * weights
    # half a byte, a byte for each 64, four for each 256 of those (whole in every layer) and for each layer
    assert decided.quantization.bytes_after == weights // 2 + scales + 4 * scales // 256 + 4 * 560


def test_only_the_completion_is_learned_and_a_long_prompt_is_cut(base: Path) -> None:
    data = imported("qwen3_4b").Completions("none.jsonl", str(base), max_tokens=8)
    pairs = [{"prompt": "a", "completion": "bcd"}, {"prompt": "0123456789", "completion": "xy"}]
    batch = data.collate(pairs)
    shown = [
        data.tokenizer.decode(row[mask.bool()])
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert shown == ["[a]bcd<end>", "6789]xy<end>"]
    learned = [data.tokenizer.decode(row[row >= 0]) for row in batch["labels"]]
    assert learned == ["bcd<end>", "xy<end>"]
    prompt, completion = data.encode({"prompt": "p", "completion": "0123456789"})
    assert (len(prompt), data.tokenizer.decode(completion)) == (1, "0123456")


def test_the_script_learns_on_two_processes_and_leaves_a_peft_directory(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    pairs = [{"prompt": f"{i}?", "completion": "yes, it is" if i % 2 else "no"} for i in range(72)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    arguments = {
        "config": EXAMPLES / "qwen3_4b.yaml", "model.base": base, "model.dtype": "float32", "model.lr": 2e-2,
        "model.gradient_checkpointing": "true", "data.num_held_out": 8, "data.num_workers": 0,
        "data.batch_size": 4, "trainer.accelerator": "cpu", "trainer.devices": 2, "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
    }  # fmt: skip
    script, options = str(EXAMPLES / "qwen3_4b.py"), [f"--{key}={value}" for key, value in arguments.items()]
    output = run(script, torchrun_variables(2), tmp_path, "fit", *options, folder=tmp_path)[0]
    assert re.search(r"2 ranks = 1 data-parallel x 2 tensor-parallel", output)
    outputs = tmp_path / "outputs" / "qwen3_4b"
    (metrics,) = outputs.rglob("metrics.csv")
    losses = [float(row["val_loss"]) for row in csv.DictReader(metrics.read_text().splitlines()) if row["val_loss"]]
    assert len(losses) == 4
    assert losses[-1] < 0.9 * losses[0], losses
    saved = torch.load(outputs / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(".lora_" in name for name in saved["state_dict"])
    load_peft(AutoModelForCausalLM.from_pretrained(base), outputs / "checkpoints" / "last-peft")
