"""The library behind the scripts in utils/: one package per subject. Rooms import downwards only, in the order of
`ROOMS` in tests/test_rooms.py; utils/README.md lists them.
"""

import sys

if sys.version_info < (3, 11):  # any Python 3 parses this file, so that the first script to run can say it
    version = ".".join(map(str, sys.version_info[:3]))
    sys.exit(
        "error: Python 3.11 or newer is needed, %s is %s; run: make PYTHON=/path/to/python3.12"
        % (sys.executable, version)
    )
