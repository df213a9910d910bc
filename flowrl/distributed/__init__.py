"""The one place that knows of other processes; accelerate is imported here and nowhere else."""
