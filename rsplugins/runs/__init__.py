"""Run directories: one certifier over one data set, resumable, re-scorable, with the evidence for each input."""
