"""Observing a model's activations while it runs."""
