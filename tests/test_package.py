"""The package as a whole: its public names, its version, the cost of importing it."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import lightning_lora
from lightning_lora import LoRAConfig, adapter_checkpoint, inject

ROOT = Path(__file__).parent.parent


def test_public_names_are_importable_and_sorted() -> None:
    assert all(hasattr(lightning_lora, name) for name in lightning_lora.__all__)
    assert sorted(lightning_lora.__all__) == list(lightning_lora.__all__)


def test_version_is_that_of_pyproject_and_changelog() -> None:
    assert f'version = "{lightning_lora.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## [{lightning_lora.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_import_loads_no_heavy_package_beyond_lightning() -> None:
    script = (
        "import sys, lightning.pytorch\n"
        "before = set(sys.modules)\n"
        "import lightning_lora\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(re.findall(r"'(\w+)'", result.stdout)) <= {"lightning_lora", "safetensors", "numpy", "lightning"}


def test_no_optional_package_is_imported_at_module_level() -> None:
    for path in (ROOT / "lightning_lora").rglob("*.py"):
        assert not re.search(r"^(import|from) (peft|transformers|megatron|bitsandbytes)", path.read_text(), re.M), path


def test_the_core_runs_without_megatron_core(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] == 'megatron':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import torch\n"
        "from lightning_lora import LoRAConfig, inject, load_peft, merge, plan, remove, save_peft\n"
        "from tests import models\n"
        "model = models.llama()\n"
        "print(plan(model, LoRAConfig(r=2)))\n"
        "save_peft(inject(model, LoRAConfig(r=2)), sys.argv[1])\n"
        "merge(load_peft(remove(model), sys.argv[1]), remove=True)\n"
        "print(sorted(name for name in sys.modules if name.partition('.')[0] == 'megatron'))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "LoRA for LlamaForCausalLM: 14 pairs" in result.stdout
    assert result.stdout.endswith("[]\n")


SNAPSHOT = """
import json, sys
import torch, torch.utils.checkpoint, lightning.pytorch as pl, lightning.fabric
import lightning.pytorch.cli, lightning.pytorch.core.saving, transformers.modeling_utils
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

def places():
    for module in list(sys.modules.values()):
        name = getattr(module, "__name__", "")
        if name.partition(".")[0] in ("torch", "lightning", "transformers"):
            yield name, module
            for key, value in list(vars(module).items()):
                if isinstance(value, type) and value.__module__ == name:
                    yield f"{name}.{key}", value

def functions():
    kinds = (type(places), staticmethod, classmethod, property)
    return {
        (name, key): value
        for name, owner in places() for key, value in list(vars(owner).items()) if isinstance(value, kinds)
    }

def changed():
    now = functions()
    return sorted(".".join(place) for place in before.keys() & now.keys() if before[place] is not now[place])

before, registered = functions(), [set(StrategyRegistry), set(STRATEGY_REGISTRY)]
import lightning_lora
names = [sorted(set(one) - known) for one, known in zip((StrategyRegistry, STRATEGY_REGISTRY), registered)]
imported = changed()
model = torch.nn.Sequential(torch.nn.Linear(2, 2))
lightning_lora.inject(model, lightning_lora.LoRAConfig(r=1))
lightning_lora.LoRACallback()
used = changed()
from lightning_lora.model.wrapping import unwrap_all
unwrap_all()
print(json.dumps([names, imported, used, changed()]))
"""


READ = """
import sys, torch, lightning as L, lightning_lora

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.strict_loading, self.model = False, torch.nn.Sequential(torch.nn.Linear(2, 2))
    def predict_step(self, x, index):
        return self.model(x)

options = {"accelerator": "cpu", "devices": 1}
module, fabric = Module(), L.Fabric(**options)
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
reads = {
    "trainer": lambda: L.Trainer(**options, **quiet).predict(module, [torch.ones(1, 2)], ckpt_path=sys.argv[1]),
    "fabric": lambda: fabric.load(sys.argv[2], {"model": fabric.setup(module.model)}, strict=False),
    "fabric raw": lambda: fabric.load_raw(sys.argv[3], module.model, strict=False),
}
for name, read in reads.items():
    try:
        read()
    except Exception as error:
        print(f"{name}: {error}")
"""


def test_a_process_that_adapts_no_model_reads_no_file_with_adapters(tmp_path: Path) -> None:
    model = inject(nn.Sequential(nn.Linear(2, 2)), LoRAConfig(r=1, target_modules=["0"]))
    file, files = adapter_checkpoint(model), [str(tmp_path / f"{name}.ckpt") for name in ("trainer", "fabric", "raw")]
    for path, key in zip(files, ("state_dict", "model", "model"), strict=True):
        section = copy.deepcopy(file["lightning_lora"])
        section["adapters"][0]["state_key"] = key
        about = {"pytorch-lightning_version": "2.6.6", "global_step": 0, "epoch": 0}
        torch.save({key: file["state_dict"], "lightning_lora": section, **(about if key == "state_dict" else {})}, path)
    result = subprocess.run([sys.executable, "-c", READ, *files], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "trainer.ckpt holds adapters, and the Trainer has no LoRACallback to put them into Module" in result.stdout
    assert "fabric.ckpt holds adapters, and no model in the state has any" in result.stdout
    assert "raw.ckpt holds adapters, and no model in the state has any" in result.stdout


def test_import_registers_two_names_and_wraps_what_reads_files_and_first_use_can_be_undone() -> None:
    result = subprocess.run([sys.executable, "-c", SNAPSHOT], capture_output=True, text=True, check=True, cwd=ROOT)
    names, imported, used, left = json.loads(result.stdout.splitlines()[-1])
    assert names == [["fsdp_lora", "megatron_lora"]] * 2
    reading = ("Fabric.load", "Fabric.load_raw", "_CheckpointConnector.restore_model", "core.saving._load_state")
    assert all(place.endswith(reading) for place in imported)
    assert all(any(place.endswith(name) for place in imported) for name in reading)
    wrapped = ("Fabric.setup", "Fabric.save", "PreTrainedModel.save_pretrained")
    assert all(any(place.endswith(name) for place in used) for name in wrapped)
    assert left == []
