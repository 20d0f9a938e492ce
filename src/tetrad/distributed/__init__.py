"""Several processes: the collectives, the device of each, who starts them and who still lives."""
