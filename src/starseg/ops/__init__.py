"""Kernels that do the same as torch's layers with less time or memory."""
