"""Cells over devices and machines with Ray.

May import: every other room.
"""
