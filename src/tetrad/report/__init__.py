"""What is shown: sections, tables on the terminal, a page, and the verdict of a run. No torch."""
