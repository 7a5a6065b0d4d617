"""One training run: its configuration, its parts, its folder and its checkpoints."""
