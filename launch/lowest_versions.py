"""Print the lowest versions that setup.cfg promises, as requirements for pip: the tests run with these too.

    pip install $(python launch/lowest_versions.py)
"""

import configparser
import re
from pathlib import Path


def main() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parent.parent / "setup.cfg")
    for requirement in setup["options"]["install_requires"].split():
        name, _, lowest = re.split(r"(>=)", requirement.split(",")[0] + ">=")[:3]
        print(f"{name}=={lowest}" if lowest else name)


if __name__ == "__main__":
    main()
