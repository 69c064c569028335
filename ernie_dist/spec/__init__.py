"""What to train: frozen, validated descriptions of a job. Nothing in this room imports torch."""
