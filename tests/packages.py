"""Packages that are there, or not, whatever is installed."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


def without_packages(monkeypatch, *names):
    """Let packages be absent: they can neither be found nor imported."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def with_packages(monkeypatch, *names):
    """Let packages be found, as empty modules."""
    for name in names:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
