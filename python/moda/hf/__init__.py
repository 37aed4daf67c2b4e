"""Modular training with Hugging Face's Trainer (needs transformers)."""

from moda.hf.callback import ModularTrainerCallback

__all__ = ["ModularTrainerCallback"]
