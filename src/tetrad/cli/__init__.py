"""The command line: from a command's arguments to the function that runs it, and its exit code."""
