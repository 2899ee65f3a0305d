"""The model zoo: the evidence behind its models, and how they come into it and out of it."""
