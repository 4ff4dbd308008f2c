"""Paths, whole-or-nothing files, devices, and how every script ends.

Imports nothing of paragen, and at its top the standard library alone: setup_env.py needs it before .venv exists.
"""
