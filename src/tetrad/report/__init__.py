"""Reports: sections, tables on the terminal, an HTML page, and the verdict of a run. No torch."""
