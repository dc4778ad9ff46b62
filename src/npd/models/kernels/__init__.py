"""Code that is compiled where it runs: layers (torch.compile), Triton kernels, wide products."""
