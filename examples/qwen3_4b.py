"""Fine-tune Qwen3-4B on prompts and completions, on 8 GPUs, each layer split over some of them.

    python examples/qwen3_4b.py fit --config examples/qwen3_4b.yaml --model.base DIR --data.path pairs.jsonl

``DIR`` holds the model as it was downloaded (config.json, safetensors, tokenizer). No process ever has the whole base:
the model is built without values, and each reads its own slices from the disk. ``pairs.jsonl`` has one
``{"prompt": ..., "completion": ...}`` a line. Any other causal language model with a tensor-parallel plan will do.
"""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from lightning_lora import linear_cross_entropy

IGNORED = -100  # the label of a position that is not learned


class CompletionWriter(L.LightningModule):
    """A causal language model that learns completions.

    Args:
        base: directory of the pretrained model.
        lr: peak of the learning rate, which warms up and then falls along a cosine to zero.
        warmup_ratio: share of all steps that the warm-up takes.
        dtype: of the frozen base; adapters are float32.
        gradient_checkpointing: keep no activations inside blocks, and compute them again in backward.
    """

    def __init__(
        self,
        base: str,
        lr: float = 2e-4,
        warmup_ratio: float = 0.03,
        dtype: str = "bfloat16",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        config = AutoConfig.from_pretrained(self.hparams["base"])
        with torch.device("meta"):  # the strategy reads the values, from where the config says that it came from
            self.model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.hparams["dtype"]))
        self.model.config.use_cache = False
        if self.hparams["gradient_checkpointing"]:
            self.model.gradient_checkpointing_enable()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean loss of the labelled tokens; no rank ever has whole logits."""
        hidden = self.model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return linear_cross_entropy(self.model, hidden, batch["labels"], ignore_index=IGNORED)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self(batch), prog_bar=True, sync_dist=True, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> dict[str, Any]:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.hparams["lr"], betas=(0.9, 0.95), weight_decay=0.0)
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = get_cosine_schedule_with_warmup(optimizer, round(self.hparams["warmup_ratio"] * total), total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Completions(L.LightningDataModule):
    """Pairs of a JSONL file; the last ones are held out.

    Args:
        path: file with one ``{"prompt": ..., "completion": ...}`` a line.
        base: directory of the tokenizer, the model's. A prompt goes through its chat template, if it has one.
        batch_size: pairs in a batch of one group of processes that share a model.
        max_tokens: of a pair; what is longer loses the beginning of its prompt, then the end of its completion.
        num_held_out: pairs at the end of the file that are validated on.
        num_workers: processes that tokenize ahead, per process.
    """

    def __init__(
        self,
        path: str,
        base: str,
        batch_size: int = 8,
        max_tokens: int = 2048,
        num_held_out: int = 256,
        num_workers: int = 2,
    ) -> None:
        super().__init__()
        self.path, self.max_tokens, self.num_held_out = path, max_tokens, num_held_out
        self.loading = {"batch_size": batch_size, "num_workers": num_workers, "collate_fn": self.collate}
        self.tokenizer = AutoTokenizer.from_pretrained(base)

    def setup(self, stage: str) -> None:
        lines = Path(self.path).read_text(encoding="utf-8").splitlines()
        pairs = [json.loads(line) for line in lines if line.strip()]
        if len(pairs) <= self.num_held_out:
            raise ValueError(f"{self.path} has {len(pairs)} pairs, and num_held_out={self.num_held_out} leaves none")
        split = len(pairs) - self.num_held_out
        self.learned, self.held_out = pairs[:split], pairs[split:]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.learned, shuffle=True, drop_last=True, **self.loading)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, **self.loading)

    def collate(self, pairs: list[dict[str, str]]) -> dict[str, Tensor]:
        """Tokenize and pad on the right, ``[batch, longest]`` each; only the completion and the end are labelled."""
        rows = [self.encode(pair) for pair in pairs]
        longest = max(len(prompt) + len(completion) for prompt, completion in rows)
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        input_ids = torch.full((len(rows), longest), padding)
        attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORED)
        for i, (prompt, completion) in enumerate(rows):
            start, end = len(prompt), len(prompt) + len(completion)
            input_ids[i, :end] = torch.tensor(prompt + completion)
            attention_mask[i, :end] = 1
            labels[i, start:end] = torch.tensor(completion)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def encode(self, pair: dict[str, str]) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt, one at least, and of its completion with the end."""
        prompt = pair["prompt"]
        if self.tokenizer.chat_template is not None:
            turn = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(
                turn, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        before = self.tokenizer(prompt, add_special_tokens=self.tokenizer.chat_template is None)["input_ids"]
        end = self.tokenizer.eos_token
        after = self.tokenizer(pair["completion"] + end, add_special_tokens=False)["input_ids"][: self.max_tokens - 1]
        return before[-max(self.max_tokens - len(after), 1) :], after


class CLI(LightningCLI):
    """Says once where the base is."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.base", "data.base")


if __name__ == "__main__":
    CLI(CompletionWriter, Completions)
