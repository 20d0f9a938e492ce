"""The reward model and other sources of reward: data, members, evaluation, and the gate before PPO."""
