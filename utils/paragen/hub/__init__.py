"""Talking to the Hugging Face hub: downloads that can be resumed, and its errors in one line.

May import: common.
"""
