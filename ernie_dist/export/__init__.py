"""From a checkpoint to a folder that any transformers user can load."""
