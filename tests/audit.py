"""Command that looks up known vulnerabilities of the pinned dependencies in the database OSV.

    python -m tests.audit [OPTION OF pip-audit]...

Exits with 1 if a version has a vulnerability. `--ignore-vuln=ID` accepts one that has no fix yet.
Prints a notice and exits with 0 if the database cannot be reached.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
# There is no connection, or the answer is an HTTP error.
_UNREACHABLE = re.compile(r"requests\.exceptions\.|Could not connect|ServiceError$", re.MULTILINE)
# Recommendations of hashes.
_ADVICE = re.compile(r"^WARNING:pip_audit\._cli:.*\n", re.MULTILINE)


def main(argv: Sequence[str]) -> int:
    """Audits all requirements files; returns the exit code."""
    command = [sys.executable, "-m", "pip_audit", "--vulnerability-service=osv", "--timeout=15"]
    # All versions are pinned: nothing has to be resolved.
    command += ["--no-deps", "--disable-pip", "--desc=off", "--progress-spinner=off"]
    command += [f"--requirement={file}" for file in sorted(ROOT.glob("requirements*.txt"))]
    result = subprocess.run([*command, *argv], capture_output=True, text=True, check=False)
    messages = _ADVICE.sub("", result.stderr).strip()
    if result.returncode and not result.stdout and _UNREACHABLE.search(messages):
        reason = messages.splitlines()[-1]
        print(f"NOT AUDITED for known vulnerabilities: OSV cannot be reached ({reason}).")
        return 0
    print("\n".join(filter(None, [result.stdout.strip(), messages])))
    return result.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
