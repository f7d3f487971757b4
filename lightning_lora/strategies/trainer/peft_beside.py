"""Write a PEFT directory beside a Trainer's checkpoint file, and remove it with the file."""

import os
from typing import Any

from lightning_lora.checkpoint.all_ranks import fail_together
from lightning_lora.checkpoint.file import SECTION
from lightning_lora.checkpoint.storage import Location, location, remove_files
from lightning_lora.model.state import injected_roots
from lightning_lora.model.summary import outside_names, say_left_out
from lightning_lora.peft.config import CONFIG_NAME
from lightning_lora.peft.directory import WEIGHTS_NAME
from lightning_lora.peft.save import write_entries
from lightning_lora.peft.writing import write_tokenizer


class PeftBeside:
    """The PEFT directories of one run.

    Attributes:
        paths: the adapted models to write, as given to ``LoRACallback(module=...)``; ``None`` means the only one.
    """

    def __init__(self) -> None:
        self.paths: frozenset[str | None] = frozenset()
        self._has_said = False

    def write(self, strategy: Any, checkpoint: dict[str, Any], filepath: Any, state_key: str) -> None:
        """Write what the file holds, which need not be what the model holds. Called on all ranks; rank 0 writes."""
        if not self.paths or location(filepath).name.startswith("."):
            return
        failure: Exception | None = None
        if strategy.is_global_zero:
            try:
                self._write(strategy, checkpoint, filepath)
            except Exception as error:
                failure = error
        if strategy._num_ranks() > 1:
            fail_together(failure)
        elif failure is not None:
            raise failure
        if not self._has_said:
            outside = outside_names(checkpoint[state_key], *injected_roots(strategy.lightning_module))
            say_left_out(peft_directory(filepath), outside, f"It is in {filepath}, under {state_key!r}")
            self._has_said = True

    def _write(self, strategy: Any, checkpoint: dict[str, Any], filepath: Any) -> None:
        roots = injected_roots(strategy.lightning_module)
        how = {"on_nonfinite": strategy.on_nonfinite_at_save()}
        for path, root in roots.items():
            if None in self.paths or path in self.paths:
                entries = [entry for entry in checkpoint[SECTION]["adapters"] if entry["root"] == path]
                directory = peft_directory(filepath, path if len(roots) > 1 else "")
                for folder in write_entries(checkpoint, entries, directory, filepath, **how):
                    write_tokenizer(getattr(root, "tokenizer", None), folder)

    def remove(self, filepath: Any) -> None:
        """Remove the directory beside a file that is removed. Called on rank 0."""
        directory = peft_directory(filepath)
        if self.paths and directory.is_dir():
            remove_files(directory, (CONFIG_NAME, WEIGHTS_NAME))


def peft_directory(filepath: Any, path: str = "") -> Location:
    """Return where the PEFT directory beside a checkpoint file is: ``last.ckpt`` has ``last-peft``."""
    stem = os.fspath(filepath).removesuffix(".ckpt")
    directory = location(f"{stem}-peft")
    return directory / path if path else directory
