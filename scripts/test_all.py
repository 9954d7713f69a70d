"""Run every group of tests, or those that are named, and print the time that each took: test_all.py [GROUP...]."""

import subprocess
import sys
import time

TWO_WORKERS = ["-n", "2", "--dist", "loadfile"]
GROUPS = {
    "default": TWO_WORKERS,
    "slow": [*TWO_WORKERS, "-m", "slow and not kill and not processes"],
    "kill": [*TWO_WORKERS, "-m", "kill"],
    "processes": [*TWO_WORKERS, "-m", "processes"],
    "browser": ["-m", "browser", "tests/browser"],
    "gpu": ["-m", "gpu"],
}


def run(group: str) -> str:
    """Run one group; "passed" or how it failed."""
    print(f"\n===== {group} =====", flush=True)
    code = subprocess.run([sys.executable, "-m", "pytest", *GROUPS[group]]).returncode
    return "passed" if code == 0 else f"FAILED (pytest's exit code {code})"


def main() -> int:
    """Run the groups; 1 if one of them failed."""
    if unknown := set(sys.argv[1:]) - GROUPS.keys():
        print(f"unknown group {', '.join(sorted(unknown))}; expected some of: {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    lines = []
    for group in sys.argv[1:] or GROUPS:
        start = time.monotonic()
        outcome = run(group)
        lines.append(f"{group:<10} {time.monotonic() - start:7.0f} s  {outcome}")
    print("\n" + "\n".join(lines))
    return int(any("FAILED" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
