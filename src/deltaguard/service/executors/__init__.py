"""Where the processes of jobs run: on this machine, or as jobs of a Ray cluster."""
