"""The stages of a run, and the chain that runs them one after another."""
