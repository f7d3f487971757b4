"""Find the rank and the learning rate for SmolLM2-135M to write definitions: nine settings in one run.

The data is the quickstart's. Each setting is an adapter, every batch is trained on by all of them, and after each
validation the worse half is dropped. The best one is written as a PEFT directory with ``save_peft``.
"""

import argparse
from pathlib import Path

import lightning as L
import torch
from quickstart import IGNORED, Definitions, DefinitionWriter
from report import tidy_output
from smollm2 import smollm2, tiny_llama
from torch import Tensor

from lightning_lora import Sweep, linear_cross_entropy, parameter_groups

GRID = {"r": [4, 16, 64], "lr": [1e-4, 3e-4, 1e-3]}


class Swept(DefinitionWriter):
    """The quickstart's module, with groups that a sweep gives their rates."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = linear_cross_entropy(self.model, self(batch), batch["labels"], ignore_index=IGNORED)
        self.log("val_loss", loss, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(self, 1e-3, lora_plus_ratio=1.0), fused=True)


def main() -> None:
    options = parse_options()
    tidy_output()
    L.seed_everything(0, verbose=False)
    base = tiny_llama() if options.tiny else smollm2()
    options.output.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(grid=GRID, halving=1, plot=options.output / "sweep.png")
    data, writer = Definitions(str(base), batch_size=options.rows), Swept(str(base), options.steps)
    trainer = L.Trainer(
        callbacks=[sweep],
        max_steps=options.steps,
        max_epochs=-1,
        val_check_interval=options.steps // 4,
        check_val_every_n_epoch=None,
        limit_val_batches=32 // options.rows // 2,
        num_sanity_val_steps=0,
        devices=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(writer, data)
    print(sweep.results.table())
    print(f"best: {sweep.best_adapter}, drawn in {options.output / 'sweep.png'}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=4, help="of a batch, which all adapters train on")
    parser.add_argument("--tiny", action="store_true", help="train a random model that is made in no time")
    parser.add_argument("--output", type=Path, default=Path("sweep"), help="folder for the plot")
    return parser.parse_args()


if __name__ == "__main__":
    main()
