"""The examples run, on a tiny model and without any download."""

import json
import re
from pathlib import Path

import torch

from tests.distributed.launch import run, torchrun_variables

ROOT = Path(__file__).parent.parent


def test_quickstart_trains_resumes_merges_and_exports(tmp_path: Path) -> None:
    output = run_example("quickstart.py", 1, tmp_path, "--steps=4", "--resume-steps=2")
    assert "Resume from step=4.ckpt" in output
    assert "Read back from the PEFT directory: logits differ by at most 0.0e+00" in output
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    (checkpoint,) = (tmp_path / "checkpoints").glob("step=6*.ckpt")
    assert all(".lora_" in name for name in torch.load(checkpoint, weights_only=True)["state_dict"])
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 8


def test_quickstart_runs_over_a_base_in_4_bits(tmp_path: Path) -> None:
    output = run_example("quickstart.py", 1, tmp_path, "--steps=4", "--resume-steps=2", "--quantize=nf4")
    assert "base in nf4: 14 linear layers" in output
    assert "Read back from the PEFT directory: logits differ by at most 0.0e+00" in output
    (checkpoint,) = (tmp_path / "checkpoints").glob("step=6*.ckpt")
    assert all(".lora_" in name for name in torch.load(checkpoint, weights_only=True)["state_dict"])


def test_qlora_goes_on_over_the_float_base(tmp_path: Path) -> None:
    output = run_example("qlora.py", 1, tmp_path, "--steps=4")
    assert "Base in nf4-dq: 14 linear layers" in output
    assert "trained over nf4-dq, loaded over float32" in output
    before, halfway, after = map(float, re.search(r"perplexity ([\d.]+) -> ([\d.]+) .* -> ([\d.]+)", output).groups())
    assert after < halfway < before
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()


def run_example(name: str, num_processes: int, directory: Path, *arguments: str) -> str:
    """Return what the first process of an example writes that torchrun has started."""
    directory.mkdir(exist_ok=True)
    variables = torchrun_variables(num_processes) if num_processes > 1 else [{}]
    return run(str(ROOT / "examples" / name), variables, directory, "--tiny", f"--output={directory}", *arguments)[0]


def test_sharded_training_learns_and_leaves_one_small_file(tmp_path: Path) -> None:
    # one process, which starts the other
    output = run_example("fsdp_trainer.py", 1, tmp_path, "--steps=8")
    before, after = map(float, re.search(r"perplexity ([\d.]+) -> ([\d.]+)", output).groups())
    assert after < before
    checkpoint = torch.load(tmp_path / "checkpoints" / "step=8.ckpt", weights_only=True)
    assert all(".lora_" in name for name in checkpoint["state_dict"])
    assert len(checkpoint["lightning_lora"]["random_states"]) == 2
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()


def test_the_same_example_splits_its_layers(tmp_path: Path) -> None:
    output = run_example("fsdp_trainer.py", 2, tmp_path, "--strategy=megatron_lora", "--steps=4")
    before, after = map(float, re.search(r"perplexity ([\d.]+) -> ([\d.]+)", output).groups())
    assert after < before
    checkpoint = torch.load(tmp_path / "checkpoints" / "step=4.ckpt", weights_only=True)
    assert all(".lora_" in name for name in checkpoint["state_dict"])
    alone = run_example("fsdp_trainer.py", 1, tmp_path / "alone", "--strategy=auto", "--devices=1", "--steps=4")
    torch.testing.assert_close(losses_of(output), losses_of(alone), rtol=1e-4, atol=1e-5)  # other order of sums


def losses_of(output: str) -> list[float]:
    return [float(value) for value in re.search(r"Losses: (.*)", output)[1].split(", ")]


def test_a_sharded_loop_of_ones_own_learns(tmp_path: Path) -> None:
    output = run_example("fsdp_fabric.py", 2, tmp_path, "--steps=4")
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", output)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    saved = torch.load(tmp_path / "adapter.ckpt", weights_only=True)
    assert all(".lora_" in name for name in saved["model"])
    assert saved["step"] == 4


def test_an_encoder_split_over_two_processes_has_the_losses_of_one(tmp_path: Path) -> None:
    split = run_example("megatron_encoder.py", 2, tmp_path / "split", "--steps=4")
    alone = run_example("megatron_encoder.py", 1, tmp_path / "alone", "--steps=4", "--strategy=auto", "--devices=1")
    losses = [losses_of(output) for output in (split, alone)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)  # other order of sums
    assert len(losses[0]) == 4
    assert re.search(r"found: [\d.]+% -> [\d.]+%", split)
    checkpoint = torch.load(tmp_path / "split" / "checkpoints" / "step=4.ckpt", weights_only=True)
    assert all(".lora_" in name for name in checkpoint["state_dict"])
    assert (tmp_path / "split" / "peft" / "adapter_model.safetensors").exists()


def test_adaptive_ranks_are_drawn_and_written_both_ways(tmp_path: Path) -> None:
    output = run_example("adalora.py", 1, tmp_path, "--steps=10")
    before, after = map(float, re.search(r"perplexity ([\d.]+) -> ([\d.]+)", output).groups())
    assert after < before
    assert re.search(r"q_proj +average rank [\d.]+, from \d+ to \d+", output)
    assert (tmp_path / "ranks.png").stat().st_size > 10_000
    kinds = {
        name: json.loads((tmp_path / name / "adapter_config.json").read_text())["peft_type"]
        for name in ("adalora", "lora")
    }
    assert kinds == {"adalora": "ADALORA", "lora": "LORA"}


def test_three_adapters_together_are_as_good_as_each_alone(tmp_path: Path) -> None:
    output = run_example("many_adapters.py", 1, tmp_path, "--steps=4")
    rows = re.findall(r"(definitions|words|characters) +([\d.]+) +([\d.]+) +([\d.]+)", output)
    assert len(rows) == 3
    for _, before, together, apart in rows:
        assert float(together) < float(before)
        assert abs(float(together) - float(apart)) < 0.02  # other order of sums, rounded to two places


def test_a_sweep_ends_with_its_best_setting(tmp_path: Path) -> None:
    output = run_example("sweep.py", 1, tmp_path, "--steps=8")
    assert "best: r64-lr1e-3" in output
    assert output.count("dropped") >= 8
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
