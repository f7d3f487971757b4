"""QLoRA: train over a base in 4 bits, without bitsandbytes and on any device, and go on over the base as it was.

What makes it QLoRA is one argument, ``LoRACallback(quantize="nf4-dq")``; the LightningModule and the data are the
quickstart's. The file holds the adapter alone, so that the second half of the run may use the base in 32 bits.
"""

import argparse
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from quickstart import Definitions, DefinitionWriter
from report import tidy_output
from smollm2 import smollm2, tiny_llama
from transformers import AutoModelForCausalLM

from lightning_lora import LoRACallback, LoRAConfig, load_peft, plan, save_peft


def main() -> None:
    options = parse_options()
    tidy_output()
    L.seed_everything(0, verbose=False)
    base = str(tiny_llama() if options.tiny else smollm2())
    data = Definitions(base)
    decided = plan(AutoModelForCausalLM.from_pretrained(base), LoRAConfig(r=8), quantize=options.quantize)
    print(f"Base in {decided.quantization}")

    writer, trainer = DefinitionWriter(base, 2 * options.steps), new_trainer(options, options.steps, options.quantize)
    [before] = trainer.validate(writer, data, verbose=False)
    trainer.fit(writer, data)
    [over_4_bits] = trainer.validate(writer, data, verbose=False)
    checkpoint = Path(trainer.checkpoint_callback.best_model_path)
    print(f"{checkpoint.name}: {checkpoint.stat().st_size / 1e6:.1f} MB")

    writer, trainer = DefinitionWriter(base, 2 * options.steps), new_trainer(options, 2 * options.steps, None)
    trainer.fit(writer, data, ckpt_path=checkpoint)  # one line says: trained over nf4-dq, loaded over float32
    [after] = trainer.validate(writer, data, verbose=False)
    steps = [one["perplexity"] for one in (before, over_4_bits, after)]
    print(f"Held-out perplexity {steps[0]:.1f} -> {steps[1]:.1f} in 4 bits -> {steps[2]:.1f} over the float base")

    save_peft(writer.model, options.output / "peft")
    load_peft(AutoModelForCausalLM.from_pretrained(base), options.output / "peft", quantize=options.quantize)
    print(f"{options.output / 'peft'} is read over either base")


def new_trainer(options: argparse.Namespace, max_steps: int, quantize: str | None) -> L.Trainer:
    checkpoint = ModelCheckpoint(options.output / "checkpoints", "{step}", every_n_train_steps=options.steps)
    return L.Trainer(
        callbacks=[LoRACallback(r=8, quantize=quantize), checkpoint],
        max_steps=max_steps,
        limit_val_batches=4,
        num_sanity_val_steps=0,
        devices=1,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quantize", choices=["nf4", "nf4-dq", "int8"], default="nf4-dq", help="form of the base (nf4-dq)"
    )
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps over each form of the base (16)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("outputs") / "qlora")
    parser.add_argument("--tiny", action="store_true", help="random Llama of 2 layers: offline, in seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
