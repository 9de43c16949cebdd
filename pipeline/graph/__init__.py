"""The only package that knows Luigi: tasks, runs, workers, and the help of further machines."""
