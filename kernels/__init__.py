"""Attention kernels. This package imports nothing of the project, and this file imports nothing at all:
with the repository root on `sys.path`, `transformers` probes for a top-level package named `kernels`."""
