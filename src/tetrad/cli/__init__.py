"""The command line: the words of a command to what does it, and its exit code."""
