"""Print pip constraints that pin every dependency in pyproject.toml to its lower bound (`make test-oldest`)."""

import re
from pathlib import Path

text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
# tomllib is not in Python 3.10, which is supported.
for name, version in re.findall(r'"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)"', text):
    print(f"{name}=={version}")
