"""A sentence encoder split over two processes: ``Trainer(strategy="megatron_lora")``, every layer's heads and neurons.

MiniLM learns to tell in 32 numbers, of its 384, which of 500 nouns a definition is of: an index a twelfth as large. The
nouns and definitions that count were held out. ``--strategy auto --devices 1`` is the same run on one process, with
the same losses; on GPUs add ``--accelerator gpu``.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share the cores; before torch is imported

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from minilm import minilm, tiny_bert
from quickstart import DATA
from report import LossHistory, tidy_output
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModel, AutoTokenizer

from lightning_lora import LoRACallback, save_peft

WIDTH = 32  # numbers that a text is told by
TEMPERATURE = 0.05


class NounFinder(L.LightningModule):
    """An encoder that brings a noun and its definition together, and keeps those of a batch apart."""

    def __init__(self, base: str, total_steps: int, lr: float = 2e-3, warmup_steps: int = 5) -> None:
        super().__init__()
        self.save_hyperparameters()
        # without dropout, which would draw another mask for a process's heads than for all of them
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        base_model = AutoModel.from_pretrained(base, add_pooling_layer=False, dtype=torch.float32, **no_dropout)
        self.model = base_model.train()

    def forward(self, texts: dict[str, Tensor]) -> Tensor:
        """Return the first numbers of the mean of all tokens, of length one: ``[batch, WIDTH]``."""
        hidden = self.model(**texts).last_hidden_state
        is_token = texts["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * is_token).sum(1) / is_token.sum(1)
        return F.normalize(mean[:, :WIDTH], dim=-1)

    def training_step(self, batch: tuple[dict[str, Tensor], dict[str, Tensor]], batch_idx: int) -> Tensor:
        nouns, glosses = map(self, batch)
        similarity = glosses @ nouns.t() / TEMPERATURE
        right = torch.arange(len(similarity), device=similarity.device)
        loss = (F.cross_entropy(similarity, right) + F.cross_entropy(similarity.t(), right)) / 2
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.nouns: list[Tensor] = []
        self.glosses: list[Tensor] = []

    def validation_step(self, batch: tuple[dict[str, Tensor], dict[str, Tensor]], batch_idx: int) -> None:
        nouns, glosses = map(self, batch)
        self.nouns.append(nouns)
        self.glosses.append(glosses)

    def on_validation_epoch_end(self) -> None:
        found = (torch.cat(self.glosses) @ torch.cat(self.nouns).t()).argmax(1)
        is_right = found == torch.arange(len(found), device=found.device)
        self.log("found", is_right.float().mean(), sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"], weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.warm_up_then_decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def warm_up_then_decay(self, step: int) -> float:
        warmup, total = self.hparams["warmup_steps"], self.hparams["total_steps"]
        return min((step + 1) / warmup, (total - step) / max(total - warmup, 1))


class Pairs(L.LightningDataModule):
    """WordNet nouns and their glosses; the last ones of the file are held out."""

    def __init__(self, base: str, num_held_out: int = 500, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        rows = [line.split("\t") for line in DATA.read_text(encoding="utf-8").splitlines()]
        self.learned, self.held_out = rows[:-num_held_out], rows[-num_held_out:]

    def train_dataloader(self) -> DataLoader:
        # Lightning's own sampler shuffles one process's data in another order than several processes'
        place = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        sampler = DistributedSampler(self.learned, **place)
        return DataLoader(self.learned, self.batch_size, sampler=sampler, drop_last=True, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, 100, collate_fn=self.collate)

    def collate(self, rows: list[list[str]]) -> tuple[dict[str, Tensor], ...]:
        names = ["input_ids", "attention_mask"]
        columns = [list(column) for column in zip(*rows, strict=True)]
        encoded = [self.tokenizer(texts, padding=True, return_tensors="pt") for texts in columns]
        return tuple({name: one[name] for name in names} for one in encoded)


def main() -> None:
    options = parse_options()
    tidy_output()
    L.seed_everything(0, verbose=False)
    base = str(tiny_bert() if options.tiny else minilm())
    finder, data, losses = NounFinder(base, options.steps), Pairs(base), LossHistory()
    checkpoint = ModelCheckpoint(options.output / "checkpoints", "{step}", every_n_train_steps=options.steps)
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        strategy=options.strategy,  # with more processes than should share a model, MegatronLoRAStrategy(2)
        callbacks=[LoRACallback(r=8), checkpoint, losses],
        max_steps=options.steps,
        num_sanity_val_steps=0,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=options.progress,
    )
    [before] = trainer.validate(finder, data, verbose=False)
    trainer.fit(finder, data)
    [after] = trainer.validate(finder, data, verbose=False)
    save_peft(finder.model, options.output / "peft")  # on all processes: the first one writes
    if trainer.is_global_zero:
        shape = list(finder.model.encoder.layer[0].intermediate.dense.weight.shape)
        print(f"First process's part of the first MLP weight: {shape}")
        print(f"Losses: {', '.join(f'{loss:.6f}' for loss in losses.losses)}")
        print(f"Held-out definitions whose noun is found: {before['found']:.1%} -> {after['found']:.1%}")
        print(f"{checkpoint.best_model_path}: {Path(checkpoint.best_model_path).stat().st_size / 1e6:.1f} MB")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--strategy", default="megatron_lora", choices=("megatron_lora", "auto"))
    parser.add_argument("--devices", type=int, default=2, help="processes (2)")
    parser.add_argument("--steps", type=int, default=32, help="optimizer steps (32)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("outputs") / "encoder")
    parser.add_argument("--tiny", action="store_true", help="random BERT of 2 layers: offline, in seconds")
    parser.add_argument("--progress", action="store_true", help="show a progress bar")
    return parser.parse_args()


if __name__ == "__main__":
    main()
