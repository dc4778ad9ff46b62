"""The folder on the PYTHONPATH of vLLM servers that npd starts; it must hold only one module."""
