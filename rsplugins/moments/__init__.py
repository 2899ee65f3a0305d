"""Gaussian moments through networks: rules for auto-LiRPA's operators, representations of covariance, estimated radii.

Importing this needs no torch; the modules do.
"""
