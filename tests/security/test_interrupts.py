"""Ctrl-C at the very beginning, while libraries are still being imported, and at the very end."""

import subprocess
import sys

import pytest

_AT_AN_IMPORT = """
import os, signal, sys

MODULE = sys.argv.pop(1)

class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == MODULE:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
from deltaguard.cli import main
sys.meta_path.insert(0, Interrupt())
main()
"""


@pytest.mark.parametrize("module", ["deltaguard.cli.app", "cyclopts", "torch", "torch.nn", "transformers"])
def test_no_traceback_however_early(tmp_path, module):
    arguments = [module, "calibrate", str(tmp_path), "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", _AT_AN_IMPORT, *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


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
