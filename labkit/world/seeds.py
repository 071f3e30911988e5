"""Which seeds belong to whom. The three ranges never overlap, so nothing a lesson asks was seen in pretraining."""

LESSON_SEEDS = range(1, 10_000)
"""Worlds for lessons and for evaluations of the base model."""

VALIDATION_SEEDS = range(10_000, 20_000)
"""Worlds and documents for choosing a checkpoint and for the validation loss."""

TRAIN_SEEDS = range(100_000, 1_000_000_000)
"""Documents for pretraining."""
