"""Running packed models: generation, the decode step, norms folded and convolutions fused."""
