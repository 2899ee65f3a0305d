"""auto-LiRPA plugged in: interval and linear bounds, and expected tight bounds as operators. Importing this needs no torch."""
