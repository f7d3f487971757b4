"""Teach SmolLM2-135M to write dictionary definitions with LoRA: two to five minutes on two CPU cores.

What makes it LoRA is one line, ``LoRACallback(r=8)``; the LightningModule and the LightningDataModule are plain ones.
The run stops early, resumes from its own adapter-only checkpoint, is merged, and travels through a PEFT directory.
With ``--quantize nf4`` the frozen base takes 4 bits a weight.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from report import Evaluation, LossHistory, Report, tidy_output
from smollm2 import smollm2, tiny_llama
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics.text import Perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_lora import LoRACallback, linear_cross_entropy, load_peft, merged, save_peft

DATA = Path(__file__).with_name("data") / "wordnet_nouns.tsv"
PROMPT = 'Definition of the noun "{}":'
NUM_SHOWN = 4
IGNORED = -100  # the label of a position that is not learned


class DefinitionWriter(L.LightningModule):
    """A causal language model that learns to continue ``PROMPT`` with a gloss."""

    def __init__(self, base: str, total_steps: int, lr: float = 1e-3, warmup_steps: int = 5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
        self.perplexity = Perplexity()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the last hidden states, ``[batch, tokens, hidden_size]``."""
        return self.model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        # only learned positions go through the output head, which costs as much as a third of the layers
        loss = linear_cross_entropy(self.model, self(batch), batch["labels"], ignore_index=IGNORED)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        targets = batch["labels"][:, 1:]
        learned = targets != IGNORED
        logits = self.model.lm_head(self(batch)[:, :-1][learned])
        self.perplexity(logits[None], targets[learned][None])
        self.log("perplexity", self.perplexity, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.hparams["lr"], weight_decay=0.0, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.warm_up_then_decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def warm_up_then_decay(self, step: int) -> float:
        warmup, total = self.hparams["warmup_steps"], self.hparams["total_steps"]
        return min((step + 1) / warmup, (total - step) / max(total - warmup, 1))

    @torch.inference_mode()
    def define(self, nouns: Sequence[str], max_new_tokens: int = 24) -> list[str]:
        """Write a definition for each noun, greedily."""
        prompts = self.tokenizer([PROMPT.format(noun) for noun in nouns], padding=True, return_tensors="pt")
        prompts = prompts.to(self.model.device)
        tokens = self.model.generate(**prompts, max_new_tokens=max_new_tokens, do_sample=False)
        return self.tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


class Definitions(L.LightningDataModule):
    """WordNet nouns and their glosses; the last ones of the file are held out."""

    def __init__(self, base: str, num_held_out: int = 150, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        rows = [line.split("\t") for line in DATA.read_text(encoding="utf-8").splitlines()]
        self.learned, self.held_out = rows[:-num_held_out], rows[-num_held_out:]

    def train_dataloader(self) -> StatefulDataLoader:
        # its position is part of a checkpoint, so a resumed run goes on with the next batch, in mid-epoch too. Its
        # order is its own, whatever else draws random numbers
        order = torch.Generator().manual_seed(0)
        return StatefulDataLoader(
            self.learned, batch_size=self.batch_size, shuffle=True, generator=order, collate_fn=self.collate
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, 2 * self.batch_size, collate_fn=self.collate)

    def collate(self, rows: list[list[str]]) -> dict[str, Tensor]:
        """Tokenize and pad, ``[batch, longest]`` each; only the gloss and the end are labelled."""
        prompts = self.tokenizer([PROMPT.format(noun) for noun, _ in rows])["input_ids"]
        glosses = self.tokenizer([f" {gloss}{self.tokenizer.eos_token}" for _, gloss in rows])["input_ids"]
        pairs = list(zip(prompts, glosses, strict=True))
        longest = max(len(prompt) + len(gloss) for prompt, gloss in pairs)
        input_ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORED)
        for i, (prompt, gloss) in enumerate(pairs):
            end = len(prompt) + len(gloss)
            input_ids[i, :end] = torch.tensor(prompt + gloss)
            attention_mask[i, :end] = 1
            labels[i, len(prompt) : end] = torch.tensor(gloss)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def main() -> None:
    options = parse_options()
    tidy_output()
    L.seed_everything(options.seed, verbose=False)
    base = tiny_llama() if options.tiny else smollm2()
    total_steps = options.steps + options.resume_steps
    data, losses, report = Definitions(str(base)), LossHistory(), Report(options.output)

    report.stage(f"Train for {options.steps} of {total_steps} steps")
    writer, trainer = DefinitionWriter(str(base), total_steps), new_trainer(options, data, losses, options.steps)
    num_base = sum(parameter.numel() for parameter in writer.model.parameters())
    before = evaluate(writer, trainer, data)
    trainer.fit(writer, data)
    checkpoint = Path(trainer.checkpoint_callback.best_model_path)
    report.sizes(num_base, writer.model, checkpoint, base / "model.safetensors")

    report.stage(f"Resume from {checkpoint.name} with a new model and a new Trainer")
    writer, trainer = DefinitionWriter(str(base), total_steps), new_trainer(options, data, losses, total_steps)
    trainer.fit(writer, data, ckpt_path=checkpoint)
    after = evaluate(writer, trainer, data)
    report.comparison(data.held_out, before, after)

    report.stage("Merge, and export as a PEFT directory")
    prompt = data.collate(data.held_out[:4])
    adapted = logits(writer.model, prompt)
    with merged(writer.model):
        report.equal("Merged", logits(writer.model, prompt), adapted)
    save_peft(writer.model, options.output / "peft")
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    load_peft(fresh, options.output / "peft", quantize=options.quantize)
    report.equal("Read back from the PEFT directory", logits(fresh, prompt), adapted)

    report.plot(losses.losses, before.perplexity, after.perplexity, resumed_at=options.steps)
    report.end()


def new_trainer(options: argparse.Namespace, data: Definitions, losses: LossHistory, max_steps: int) -> L.Trainer:
    total_steps = options.steps + options.resume_steps
    max_epochs = math.ceil(total_steps / len(data.train_dataloader()))
    every = math.gcd(options.steps, options.resume_steps)
    folder = options.output / "checkpoints"
    checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=every, enable_version_counter=False)
    return L.Trainer(
        callbacks=[LoRACallback(r=8, quantize=options.quantize), checkpoint, losses],
        max_steps=max_steps,
        max_epochs=max_epochs,
        limit_train_batches=total_steps,  # gives the progress bar its length
        check_val_every_n_epoch=max_epochs + 1,  # main() validates, before and after
        num_sanity_val_steps=0,
        devices=1,
        logger=False,
        enable_model_summary=False,
    )


def evaluate(writer: DefinitionWriter, trainer: L.Trainer, data: Definitions) -> Evaluation:
    [metrics] = trainer.validate(writer, data, verbose=False)
    return Evaluation(metrics["perplexity"], writer.define([noun for noun, _ in data.held_out[:NUM_SHOWN]]))


@torch.inference_mode()
def logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=32, help="optimizer steps before the run stops (32)")
    parser.add_argument("--resume-steps", type=int, default=8, help="steps after it has resumed (8)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("outputs"), help="folder for results")
    parser.add_argument("--quantize", choices=["nf4", "nf4-dq", "int8"], help="form of the frozen base (as it is)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="random Llama of 2 layers: offline, in seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
