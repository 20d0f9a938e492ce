"""A finished model in use: answers, conversations and scores. Nothing here trains."""
