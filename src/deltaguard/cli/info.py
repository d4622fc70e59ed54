"""`deltaguard info`."""

from rich.table import Table

from deltaguard.cli.sink import Json, emit


def info(*, json: Json = False) -> None:
    """Show versions and devices.

    Args:
        json: Print one JSON document and nothing else on stdout.
    """
    import torch

    from deltaguard.reports.records.base import environment

    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found = environment(", ".join(["cpu", *(f"cuda:{i} ({name})" for i, name in enumerate(cuda))]))
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, version in found.versions.items():
        table.add_row(name, version)
    table.add_row("machine", found.machine)
    table.add_row("devices", found.device)
    emit(found, table, as_json=json)
