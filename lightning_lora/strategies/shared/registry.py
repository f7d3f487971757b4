"""Register a strategy's name with Lightning, for ``Trainer(strategy=name)`` and ``Fabric(strategy=name)``."""

from lightning.fabric import strategies as fabric
from lightning.pytorch.strategies import StrategyRegistry


def register(name: str, description: str, for_trainer: type, for_fabric: type) -> None:
    """Register both classes under ``name``; a second call does nothing."""
    for registry, strategy in ((StrategyRegistry, for_trainer), (fabric.STRATEGY_REGISTRY, for_fabric)):
        if name not in registry:
            registry.register(name, strategy, description=description)
