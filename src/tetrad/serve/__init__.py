"""A finished model in use: generate, score, chat."""
