"""What algorithms on rollouts share: the models, rollouts, what is learned from, the monitor."""
