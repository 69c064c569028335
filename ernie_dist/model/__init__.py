"""The network: building it, its attention over packed documents, and its loss."""
