"""Runs: the run folder, the records of its stages, starting and interrupting processes, devices."""
