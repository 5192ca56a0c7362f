"""Symmetries of PyTorch modules, and teleports along them."""
