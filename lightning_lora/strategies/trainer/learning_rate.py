"""The rates of a run's optimizers: LoRA+ from the command line, and what the first lines say of them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.callbacks import LearningRateFinder
from torch import nn

from lightning_lora.model.learning_rate import check_ratio_is_kept, rate_line
from lightning_lora.model.parameter_groups import parameter_groups


def check_rates(trainer: Any, root: nn.Module, lora_plus_ratio: float | None) -> None:
    """Say in one line when the rate is far from those that LoRA is trained with. Called before the first step.

    Raises:
        ValueError: a ratio was asked for, and no optimizer has LoRA+'s groups, or the schedule levels them.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if lora_plus_ratio is not None and not any(group.get("lr_ratio") == lora_plus_ratio for group in groups):
        raise ValueError(
            f"lora_plus_ratio={lora_plus_ratio:g} of LoRACallback is for the optimizer that LightningCLI builds "
            "(--optimizer=AdamW), and this module's configure_optimizers builds its own: leave it out there, and write "
            f"torch.optim.AdamW(parameter_groups(self, lr, lora_plus_ratio={lora_plus_ratio:g}))"
        )
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    check_ratio_is_kept(trainer.optimizers, schedulers)
    if any(isinstance(callback, LearningRateFinder) for callback in trainer.callbacks):
        return  # it replaces the rate
    line = rate_line(root, trainer.optimizers, schedulers)
    if line is not None:
        rank_zero_info(line)


@contextlib.contextmanager
def handing_out_groups(
    module: nn.Module, ratios: Iterable[float | None], read_settings: Callable[[], Mapping[str, Any]]
) -> Iterator[None]:
    """Let ``module.parameters()``, which LightningCLI builds its optimizer of, give LoRA+'s groups inside the block.

    Args:
        ratios: of the callbacks of the run; without any, nothing changes.
        read_settings: returns what the command line gives the optimizer.

    Raises:
        ValueError: callbacks ask for several ratios.
    """
    asked = sorted({ratio for ratio in ratios if ratio is not None})
    if len(asked) > 1:
        raise ValueError(f"the LoRACallbacks of a run share its optimizer; they ask for lora_plus_ratio={asked}")
    if not asked:
        yield
        return
    settings = read_settings()
    rate: Any = settings.get("lr")  # what is no number is refused by parameter_groups
    groups = parameter_groups(module, rate, lora_plus_ratio=asked[0], weight_decay=settings.get("weight_decay", 0.0))
    vars(module)["parameters"] = lambda: groups
    try:
        yield
    finally:
        del vars(module)["parameters"]
