"""Images that are larger than those of the training."""
