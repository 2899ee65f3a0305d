"""The machine that work is done on: its files, devices and processes, and how far the work is. It knows nothing of models."""
