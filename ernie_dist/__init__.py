"""The training job: everything that runs inside a rank."""
