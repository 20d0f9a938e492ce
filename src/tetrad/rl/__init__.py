"""What rollout-based algorithms share: the models, rollouts, training batches, the monitor."""
