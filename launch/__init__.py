"""Starting runs of several processes: on this machine, on Slurm, on Kubernetes."""
