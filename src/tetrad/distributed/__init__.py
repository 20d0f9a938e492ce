"""Several processes: the collectives, the device of each, their launcher and their watchdog."""
