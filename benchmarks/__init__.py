"""Speed and memory, side by side with what one would use instead. Each module runs by `python -m benchmarks.NAME`."""
