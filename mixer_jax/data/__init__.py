"""From images on disk to batches on devices."""
