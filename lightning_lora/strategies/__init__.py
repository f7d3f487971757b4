"""How a run saves, loads, shards and reduces: for the Trainer, for Fabric, and what both share.

A strategy is one mixin in ``shared`` (its options, its ranks, placing a model) and one class each for Trainer and
Fabric. To add an option: name it in the mixin's ``__init__``, describe it in the docstring of the Trainer's class, and
read it where the mixin places the model.
"""
