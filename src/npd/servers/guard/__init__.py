"""What goes into a vLLM server that npd starts: this folder on its PYTHONPATH, nothing else."""
