"""Smooth-Reduce's parts: the fixed set of patches or sub-videos, the lifted map and its norm, the reduced classifier.

``windows`` and ``claims`` need no torch; ``function`` does.
"""
