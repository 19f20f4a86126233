"""What the numbers of a modality mean: hard-label loss and metrics; one modality a file."""
