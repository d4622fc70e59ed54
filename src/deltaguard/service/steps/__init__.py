"""What processes of their own do for jobs: one file a task."""
