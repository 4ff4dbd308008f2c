"""Base models on disk: which there are, whether they are whole, how to download or make them.

May import: common, hub.
"""
