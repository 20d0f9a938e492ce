"""Policies on the same prompts, judged by others than their training reward."""
