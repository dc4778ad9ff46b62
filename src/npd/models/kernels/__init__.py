"""Code that is compiled where it runs: layers (torch.compile), Triton kernels, wide products."""

# Replaces -inf: exp(NOTHING) is 0, and 0 * NOTHING and NOTHING - NOTHING are 0 instead of NaN.
NOTHING = -1e30
