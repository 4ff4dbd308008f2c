"""The library behind the scripts in utils/: one package per subject. Rooms import downwards only, in the order of
`ROOMS` in tests/test_rooms.py; utils/README.md lists them.
"""
