"""Images that are larger than the training images: overlapping tiles of the training size."""
