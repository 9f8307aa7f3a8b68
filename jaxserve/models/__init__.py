"""Models in Flax, their configuration, and the loading of checkpoints."""
