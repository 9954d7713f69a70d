"""Kernels that compute what torch's layers compute in less time or memory."""
