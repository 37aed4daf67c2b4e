"""Reuse, replacement, sweeps and analysis over trained runs."""
