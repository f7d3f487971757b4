"""The examples run, on a tiny model and without any download."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def test_quickstart_trains_resumes_merges_and_exports(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "examples/quickstart.py",
        "--tiny",
        "--steps=4",
        "--resume-steps=2",
        f"--output={tmp_path}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Resume from step=4.ckpt" in result.stdout
    assert "Read back from the PEFT directory: logits differ by at most 0.0e+00" in result.stdout
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    (checkpoint,) = (tmp_path / "checkpoints").glob("step=6*.ckpt")
    assert all(".lora_" in name for name in torch.load(checkpoint, weights_only=True)["state_dict"])
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 8
