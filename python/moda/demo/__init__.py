"""The demonstration on handwritten digits, from training to the page."""
