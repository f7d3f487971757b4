"""README and docs: their Python blocks run, their links lead somewhere, and what they name exists."""

import ast
import re
import warnings
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NUM_BLOCKS = {
    "README.md": 1,
    "adalora.md": 2,
    "quickstart.md": 1,
    "learning_rate.md": 1,
    "how_it_works.md": 1,
    "performance.md": 1,
    "from_peft.md": 11,
    "quantization.md": 3,
    "serving.md": 5,
    "many_adapters.md": 4,
}


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_pages_have_the_blocks_that_are_run() -> None:
    assert {page.name: len(blocks(page)) for page in PAGES if blocks(page)} == NUM_BLOCKS


@pytest.mark.parametrize("name", NUM_BLOCKS)
def test_python_blocks_run_in_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (page,) = [page for page in PAGES if page.name == name]
    monkeypatch.chdir(tmp_path)
    # a folder of the name that the blocks load is read in place of the Hub's model
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=256)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "HuggingFaceTB" / "SmolLM2-135M")
    with warnings.catch_warnings():
        if name != "from_peft.md":
            warnings.simplefilter("ignore")  # a loader with too few workers for Lightning's taste
        exec(compile("\n".join(blocks(page)), str(page), "exec"), {"__name__": "page"})
    written = {
        "quickstart.md": "adapter",
        "adalora.md": "adalora",
        "from_peft.md": "converted",
        "serving.md": "adapter",
    }
    if name in written:
        assert (tmp_path / written[name] / "adapter_config.json").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_tree_names_what_exists_and_leaves_nothing_out() -> None:
    tree = re.search(r"```\nlightning_lora/\n(.*?)```", (ROOT / "docs" / "how_it_works.md").read_text(), re.DOTALL)
    assert tree is not None
    named = {name.rstrip("/") for name in re.findall(r"^  (\S+)", tree[1], re.MULTILINE)}
    there = {path.name for path in (ROOT / "lightning_lora").iterdir()} - {"__init__.py", "__pycache__", "py.typed"}
    assert named == there


def test_errors_that_the_docs_explain_are_raised_somewhere() -> None:
    messages = []
    for path in (ROOT / "lightning_lora").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                messages.append("".join(one.value if isinstance(one, ast.Constant) else "\0" for one in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                messages.append(node.value)
    text = "\n".join(messages)
    explained = re.findall(r"^\| `(.*?)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert len(explained) > 10
    for message in explained:
        for piece in re.split(r"\.\.\.|'x'|'lora_alpha'", message):
            assert piece.strip() in text, message
