"""The settings of every stage: frozen dataclasses without torch. A field's docstring is its `--help`."""
