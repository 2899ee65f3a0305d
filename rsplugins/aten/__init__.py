"""Models as torch.export sees them: a graph of aten operators with static shapes, and bounds that are read off it."""
