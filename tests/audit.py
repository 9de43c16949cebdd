"""Look up the installed packages in PyPI's database of advisories with pip-audit: the last part of `make check`.

Where no database can be reached, the check is skipped and says so: known vulnerabilities are then unknown, not absent.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import requests

#: A page of the database, of a version as pip-audit asks for it.
PROBE = f"https://pypi.org/pypi/requests/{version('requests')}/json"
PROBE_SECONDS, SECONDS = 3.0, 120.0


def unreachable(url: str = PROBE) -> str:
    """Return why the database cannot be asked, empty if it can."""
    try:
        response = requests.get(url, timeout=PROBE_SECONDS)
        if response.status_code == 200 and "vulnerabilities" in response.json():
            return ""
    except (requests.RequestException, ValueError) as exc:
        return type(exc).__name__
    return f"status {response.status_code}"


def verdict(report: str) -> tuple[int, str]:
    """Return exit code and text for a report of pip-audit in JSON."""
    try:
        packages = json.loads(report)["dependencies"]
    except ValueError:
        return skipped("pip-audit has no report")
    known = [one for one in packages if "vulns" in one]
    if not known:
        return skipped("the database knows none of the packages")
    found = [
        f"{one['name']} {one['version']}: {vulnerability['id']}, fixed in {', '.join(vulnerability['fix_versions'])}"
        for one in known
        for vulnerability in one["vulns"]
    ]
    return (1, "\n".join(found)) if found else (0, f"pip-audit: no advisory for {len(known)} packages.")


def skipped(reason: str) -> tuple[int, str]:
    """Return exit code and text of a check that was not made."""
    return 0, f"pip-audit: SKIPPED, no database of advisories is reachable ({reason}); nothing was checked."


def audit() -> tuple[int, str]:
    """Return exit code and text for what is installed."""
    if reason := unreachable():
        return skipped(reason)
    command = [sys.executable, "-m", "pip_audit", "--skip-editable", "--progress-spinner=off", "--timeout=5", "-fjson"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return skipped(f"no report within {SECONDS:.0f} s")
    return verdict(done.stdout.decode())


if __name__ == "__main__":
    code, text = audit()
    print(text, file=sys.stderr)
    sys.exit(code)
