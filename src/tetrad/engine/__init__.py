"""One training step, one sampler, one run folder: what the stages share."""
