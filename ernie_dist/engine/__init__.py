"""Model, optimizer and sharding behind one protocol."""
