"""Modularization methods: ways to get one module per class out of a network."""
