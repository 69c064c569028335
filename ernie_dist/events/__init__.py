"""What happened, for whoever watches. Sinks see events; none may steer."""
