"""Attention kernels, losses and the perturbation of Cyto-SSL; imports torch and jaxtyping only."""
