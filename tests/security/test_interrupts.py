"""Ctrl-C at the very beginning, while libraries are still being imported, and at the very end."""

import signal
import subprocess
import sys
import time

import pytest

from programs import start


@pytest.mark.parametrize("seconds", [0.3, 0.6, 1.0, 1.6])
def test_no_traceback_however_early(tmp_path, seconds):
    begun = tmp_path / "begun"
    process = start("calibrate", tmp_path, "-o", tmp_path / "out", begun=begun)
    while not begun.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    # On a fast machine the command may have found by then that the folder holds no model.
    assert process.returncode in (1, 130)


def test_an_import_that_would_survive_an_interrupt_ends_with_it(tmp_path):
    (tmp_path / "stubborn.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    print('survived')\n"
    )
    program = (
        "import signal, sys; from deltaguard.cli import _interrupt; "
        f"sys.path.insert(0, {str(tmp_path)!r}); signal.signal(signal.SIGINT, _interrupt); import stubborn"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def test_a_command_that_is_over_ends_with_its_code():
    program = (
        "import os, signal, sys\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, process=os.getpid(), interrupt=signal.SIGINT):\n"
        "        kill(process, interrupt)\n"
        "last = Last()\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from deltaguard.cli import main\n"
        "sys.argv = ['deltaguard', '--version']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
