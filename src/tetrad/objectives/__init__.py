"""Losses, advantages and measures as pure functions of tensors. Imports torch and nothing of Tetrad's."""
