"""The methods of restoring: each a file with a `Method`, and one entry here.

Command line, dial, sweep, bench, model card, documentation and errors read `METHODS`.
"""

from collections.abc import Generator
from contextlib import contextmanager

from deltaguard.errors import DeltaguardError
from deltaguard.methods.closed_form import Kfac, Ridge
from deltaguard.methods.greedy import Greedy
from deltaguard.methods.interpolate import Interpolate, WiseFt
from deltaguard.methods.method import Method
from deltaguard.methods.published import Published
from deltaguard.methods.resta import Resta
from deltaguard.methods.safe_lora import SafeLora
from deltaguard.methods.safe_merge import SafeMerge

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Kfac(),
        Ridge(),
        Greedy(),
        Published(),
        Interpolate(),
        WiseFt(),
        Resta(),
        SafeLora(),
        SafeMerge(),
    )
}
"""All methods by name, in the order of help, tables and plots; the first is the default."""


def find_method(name: str) -> Method:
    """Find a method by its name.

    Raises:
        DeltaguardError: there is none; all names are listed.
    """
    if name not in METHODS:
        raise DeltaguardError(f"There is no method {name!r}; there are {', '.join(METHODS)}.")
    return METHODS[name]


@contextmanager
def registered(method: Method) -> Generator[None]:
    """Make a method of your own known as long as the context lasts, to restore, sweep and bench with it.

    Args:
        method: with a name that is not taken.

    Raises:
        DeltaguardError: there is a method of that name.

    Example:
        ```python
        with registered(MyMethod()):
            restore("aligned", "finetuned", "out", config=RestoreConfig(method="mine", strength=0.5))
        ```
    """
    if method.name in METHODS:
        raise DeltaguardError(f"There is a method {method.name!r} already.")
    METHODS[method.name] = method
    try:
        yield
    finally:
        del METHODS[method.name]
