"""Patches: squares of an image that an adversary may fill as it likes, and masks that cover them."""
