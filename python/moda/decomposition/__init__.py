"""From firing rates to one module per class."""
