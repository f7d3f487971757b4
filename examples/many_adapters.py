"""Teach SmolLM2-135M three tasks in one run, with an adapter for each, and compare with a run of its own for each.

Definitions (a noun to its gloss), words (a gloss to its noun), and characters (a character to its Unicode name). Every
batch has rows of all tasks and names them, and each adapter is trained by its own rows alone.
"""

import argparse
import random
import unicodedata
from pathlib import Path
from time import process_time
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from quickstart import DATA, IGNORED
from report import tidy_output
from smollm2 import smollm2, tiny_llama
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_lora import LoRACallback, LoRAConfig, losses_by_adapter, parameter_groups

ADAPTERS = {"definitions": LoRAConfig(r=8), "words": LoRAConfig(r=8), "characters": LoRAConfig(r=4)}
RATES = {"definitions": 1e-3, "words": 1e-3, "characters": 2e-3}
NUM_HELD_OUT = 32


class Tasks(L.LightningModule):
    """A causal language model that continues a prompt with the answer, as the adapter of the row has learned it."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the mean loss of the answers' tokens, by adapter."""
        hidden = self.model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        learned = batch["labels"][:, 1:] != IGNORED
        logits = self.model.lm_head(hidden[:, :-1][learned])
        losses = F.cross_entropy(logits, batch["labels"][:, 1:][learned], reduction="none")
        return losses_by_adapter(losses, batch["adapter"], lengths=learned.sum(1))

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        return torch.stack([*self.losses(batch).values()]).sum()

    def validation_step(self, batch: dict[str, Any]) -> None:
        for name, loss in self.losses(batch).items():
            self.log(f"{name}", loss.exp(), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        rates = {name: RATES[name] for name in self.names}
        return torch.optim.AdamW(parameter_groups(self, rates, lora_plus_ratio=1.0))

    names: list[str]  # of the adapters in this run


def samples() -> dict[str, list[tuple[str, str]]]:
    """Return prompts and answers, by task."""
    nouns = [line.split("\t") for line in DATA.read_text(encoding="utf-8").splitlines()]
    characters = [chr(code) for code in range(0xC0, 0x2C00) if unicodedata.name(chr(code), "")]
    random.Random(0).shuffle(characters)
    return {
        "definitions": [(f'Definition of the noun "{noun}":', f" {gloss}") for noun, gloss in nouns],
        "words": [(f"The noun for {gloss}:", f" {noun}") for noun, gloss in nouns],
        "characters": [
            (f'Unicode name of "{one}":', f" {unicodedata.name(one).lower()}") for one in characters[: len(nouns)]
        ],
    }


def batches(tokenizer: Any, names: list[str], rows: int, number: int, first: int = 0) -> list[dict[str, Any]]:
    """Return ``number`` batches with ``rows`` rows of each task."""
    data = samples()
    return [
        collate(tokenizer, [(name, *pair) for name in names for pair in data[name][start : start + rows]])
        for start in range(first, first + number * rows, rows)
    ]


def collate(tokenizer: Any, rows: list[tuple[str, str, str]]) -> dict[str, Any]:
    """Tokenize and pad, ``[rows, longest]`` each; only the answer and the end are labelled."""
    prompts = [tokenizer(prompt)["input_ids"] for _, prompt, _ in rows]
    answers = [tokenizer(f"{answer}{tokenizer.eos_token}")["input_ids"] for *_, answer in rows]
    texts = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    labels = [text.clone() for text in texts]
    for own, prompt in zip(labels, prompts, strict=True):
        own[: len(prompt)] = IGNORED
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(texts, True, tokenizer.pad_token_id or 0),
        "attention_mask": pad([torch.ones_like(text) for text in texts], True),
        "labels": pad(labels, True, IGNORED),
        "adapter": [name for name, *_ in rows],
    }


def train(
    base: Path, names: list[str], options: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float], float]:
    """Train the adapters ``names``; return the perplexities before and after, by task, and the seconds of
    processor time."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    learned = batches(tokenizer, names, options.rows, options.steps)
    held_out = batches(tokenizer, names, NUM_HELD_OUT, 1, first=len(samples()["words"]) - NUM_HELD_OUT)
    module = Tasks(str(base))
    module.names = names
    lora = LoRACallback(adapters={name: ADAPTERS[name] for name in names}, adapter_key="adapter")
    trainer = L.Trainer(
        callbacks=[lora],
        max_epochs=1,
        check_val_every_n_epoch=2,  # before and after alone
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,  # of each adapter's own norm
        devices=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    validation = DataLoader(held_out, batch_size=None)
    [before] = trainer.validate(module, validation, verbose=False)
    start = process_time()
    trainer.fit(module, DataLoader(learned, batch_size=None), validation)
    seconds = process_time() - start
    [after] = trainer.validate(module, validation, verbose=False)
    return before, after, seconds


def main() -> None:
    options = parse_options()
    tidy_output()
    torch.manual_seed(0)
    base = tiny_llama() if options.tiny else smollm2()
    before, together, seconds = train(base, list(ADAPTERS), options)
    apart, total = {}, 0.0
    for name in ADAPTERS:
        _, own, own_seconds = train(base, [name], options)
        apart |= own
        total += own_seconds
    print(f"{'held-out perplexity':<20}{'before':>10}{'together':>10}{'apart':>10}")
    for name in ADAPTERS:
        print(f"{name:<20}{before[name]:>10.2f}{together[name]:>10.2f}{apart[name]:>10.2f}")
    print(f"Processor time: {seconds:.0f} s in one run, {total:.0f} s in three")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4, help="of each task in a batch")
    parser.add_argument("--tiny", action="store_true", help="train a random model that is made in no time")
    parser.add_argument("--output", type=Path, default=Path("many-adapters"), help="unused: nothing is written")
    return parser.parse_args()


if __name__ == "__main__":
    main()
