"""What every stage shares: the step, the optimizer, the run folder, checkpoints."""
