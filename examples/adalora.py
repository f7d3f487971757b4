"""Let AdaLoRA choose each layer's rank while SmolLM2-135M learns to write definitions, and draw the ranks.

The module and the data are the quickstart's. The run ends as a PEFT directory of AdaLoRA, and as one of plain LoRA.
"""

import argparse
import json
from pathlib import Path

import lightning as L
from matplotlib.figure import Figure
from quickstart import Definitions, DefinitionWriter
from report import tidy_output
from smollm2 import smollm2, tiny_llama

from lightning_lora import AdaLoRA, LoRACallback, save_peft


def main() -> None:
    options = parse_options()
    tidy_output()
    L.seed_everything(0, verbose=False)
    base = tiny_llama() if options.tiny else smollm2()
    data, writer = Definitions(str(base)), DefinitionWriter(str(base), options.steps)
    # a fifth of the steps before the first pruning, and a fifth after the last
    schedule = AdaLoRA(
        target_r=options.rank, init_r=2 * options.rank, tinit=options.steps // 5, tfinal=options.steps // 5
    )
    lora = LoRACallback(adalora=schedule)
    trainer = L.Trainer(
        callbacks=[lora],
        max_steps=options.steps,
        max_epochs=-1,
        num_sanity_val_steps=0,
        limit_val_batches=4,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    [before] = trainer.validate(writer, data, verbose=False)
    trainer.fit(writer, data)
    [after] = trainer.validate(writer, data, verbose=False)
    print(f"perplexity {before['perplexity']:.1f} -> {after['perplexity']:.1f}")

    steps, ranks = lora.rank_history()
    print_ranks({name: values[-1] for name, values in ranks.items()})
    options.output.mkdir(parents=True, exist_ok=True)
    draw_ranks(steps, ranks).savefig(options.output / "ranks.png", dpi=120)
    save_peft(writer.model, options.output / "adalora")
    save_peft(writer.model, options.output / "lora", as_lora=True)
    config = json.loads((options.output / "lora" / "adapter_config.json").read_text())
    print(f"As plain LoRA: r={config['r']}, and other ranks for {len(config['rank_pattern'])} layers")


def print_ranks(last: dict[str, int]) -> None:
    """Print the average rank of the layers of each name."""
    by_kind: dict[str, list[int]] = {}
    for name, rank in last.items():
        by_kind.setdefault(name.rpartition(".")[2], []).append(rank)
    for kind, values in sorted(by_kind.items(), key=lambda item: -sum(item[1]) / len(item[1])):
        print(f"{kind:<12} average rank {sum(values) / len(values):.1f}, from {min(values)} to {max(values)}")


def draw_ranks(steps: list[int], ranks: dict[str, list[int]]) -> Figure:
    """Draw the rank of each layer (down) at each step (across) as a color."""
    figure = Figure(figsize=(9, 1.5 + 0.16 * len(ranks)), layout="constrained")
    axes = figure.subplots()
    names = sorted(ranks, key=lambda name: (name.rpartition(".")[2], list(ranks).index(name)))
    image = axes.imshow(
        [ranks[name] for name in names],
        aspect="auto",
        interpolation="nearest",
        extent=(steps[0] - 0.5, steps[-1] + 0.5, len(names) - 0.5, -0.5),
        vmin=0,
    )
    axes.set_yticks(range(len(names)), [name.removeprefix("model.layers.") for name in names], fontsize=6)
    axes.set_xlabel("optimizer step")
    axes.set_title("Ranks that AdaLoRA keeps, by layer and step")
    figure.colorbar(image, ax=axes, label="rank")
    return figure


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (40)")
    parser.add_argument("--rank", type=int, default=4, help="rank at the end, on average; the first is twice it (4)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("outputs"), help="folder for results")
    parser.add_argument("--tiny", action="store_true", help="random Llama of 2 layers: offline, in seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
