"""What is started as python -m scripts.NAME, in the project's directory, with the project's own Python."""

import sys
from importlib.util import find_spec

if find_spec("yaml") is None or find_spec("pydantic") is None:  # before a script imports them, with a traceback
    print(
        f"error: {sys.executable} lacks what wellposed needs; use .venv/bin/python, which "
        "make .venv/train.installed makes",
        file=sys.stderr,
    )
    sys.exit(2)
