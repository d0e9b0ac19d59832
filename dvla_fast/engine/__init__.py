"""Loops: pre-training, meta-tuning, evaluation, checkpoints, run folders, and the demo.

Import the submodules directly; this file imports nothing, so that reading a configuration does
not load models.
"""
