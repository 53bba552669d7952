"""Small products, fast: kernels that stand in for plain PyTorch where few tokens meet many weights."""
