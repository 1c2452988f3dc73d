"""AutoMegaKernel: a decoder model compiled into one persistent CUDA megakernel."""
