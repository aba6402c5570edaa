"""Mechanisms for running on several devices: meshes, sharding, checkpointing of activations. They know no
model.
"""
