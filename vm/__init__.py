"""What runs a proven program: the CPU reference machine and the CUDA machine."""
