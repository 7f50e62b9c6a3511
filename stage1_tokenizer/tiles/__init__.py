"""Images that are larger than those of the training: overlapping tiles of the training size."""
