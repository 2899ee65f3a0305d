"""Attacks in the l-infinity ball: for adversarial training and for what is measured of a model."""
