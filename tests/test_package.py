"""The package as a whole: its public names, its version, the cost of importing it."""

import re
import subprocess
import sys
from pathlib import Path

import lightning_lora

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
