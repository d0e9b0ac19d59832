"""Triton kernels of dvla_fast, importable as ``dvla_fast.kernels``: one folder per op.

Importing this package costs nothing and needs no Triton; importing an op's folder does.
"""
