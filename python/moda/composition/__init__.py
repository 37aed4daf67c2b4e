"""The smaller model of some classes: masked, composed, replaced, measured, exported."""
