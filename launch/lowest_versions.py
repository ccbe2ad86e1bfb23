"""Print the lowest versions that setup.cfg allows, as requirements for pip.

    pip install $(python launch/lowest_versions.py)

The tests must pass with these versions too.
"""

import configparser
from pathlib import Path


def main() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parent.parent / "setup.cfg")
    for requirement in setup["options"]["install_requires"].split():
        # An upper bound stands behind a comma.
        name, _, lowest = requirement.partition(",")[0].partition(">=")
        print(f"{name}=={lowest}" if lowest else name)


if __name__ == "__main__":
    main()
