"""Files and processes of the embedded services."""

from __future__ import annotations

import os
import subprocess
import sys

from embedded_supabase.files import has_ended, wait_until


def test_a_process_has_ended_when_it_is_a_zombie_and_when_it_is_reaped_but_not_before() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert not has_ended(process.pid)
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
        assert wait_until(lambda: has_ended(process.pid), 10)
        assert os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None, "it is a zombie yet"
        process.wait()
        assert has_ended(process.pid)
