"""Make a folder with the packages that a bare GPU machine lacks beside torch, transformers and
PEFT: wheels for Python 3.12, small enough to carry.

    # bitsandbytes, with no library but that for CUDA 13.0, and pydantic.
    python bench/gpu_wheels.py wheels
    # TRL with datasets as well, for bench/gpu.py --peers.
    python bench/gpu_wheels.py wheels --peers

On that machine, which needs no network:

    pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=.:site python bench/gpu.py --output found
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from medqlora.core.command import CommandParser, run_command
from medqlora.core.errors import ConfigError

MOST_BYTES = 64 * 2**20
PYTHON = "3.12"
# A wheel is taken if its tag is one of these, so all tags that the packages use are named.
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_24_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "any",
)
# pip resolves no dependencies here, so pydantic's own stand in the list, pydantic-core in the very
# version that pydantic asks for.
NEEDED = (
    "bitsandbytes==0.50.2",
    "pydantic==2.14.4",
    "pydantic-core==2.50.5",
    "annotated-types==0.8.0",
    "typing-inspection==0.4.5",
)
PEERS = ("trl==1.16.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19", "liger-kernel")
# bitsandbytes' wheel holds many libraries; only these two stay in it.
LIBRARIES = ("libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so")


def main() -> None:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder to fill; must not be there, or be empty")
    parser.add_argument("--peers", action="store_true", help="also what bench/gpu.py --peers needs")
    arguments = parser.parse_args()
    if arguments.folder.exists() and any(arguments.folder.iterdir()):
        raise ConfigError(f"{arguments.folder} is not empty; give another folder")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    download(arguments.folder, [*NEEDED, *(PEERS if arguments.peers else ())])
    (wheel,) = arguments.folder.glob("bitsandbytes-*.whl")
    cut_down(wheel)
    sizes = {path.name: path.stat().st_size for path in sorted(arguments.folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size / 2**20:7.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / 2**20:7.2f} MiB  in all")
    if total > MOST_BYTES:
        raise ConfigError(f"{arguments.folder} is over {MOST_BYTES / 2**20:.0f} MiB; carry less")


def download(folder: Path, packages: list[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        f"--python-version={PYTHON}",
        "--implementation=cp",
        *(f"--platform={name}" for name in PLATFORMS),
        f"--dest={folder}",
        *packages,
    ]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]
        raise ConfigError(f"pip could not download: {reason}")


def cut_down(wheel: Path) -> None:
    """Remove the compiled libraries that are not in LIBRARIES."""
    aside = wheel.with_suffix(".tmp")
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            name = Path(entry.filename).name
            if name.startswith("libbitsandbytes_") and name not in LIBRARIES:
                continue
            target.writestr(entry, source.read(entry))
    # The name is taken over only when the new file is complete.
    aside.replace(wheel)


if __name__ == "__main__":
    run_command(main)
