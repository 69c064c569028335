"""From documents on disk to the batches of one rank."""
