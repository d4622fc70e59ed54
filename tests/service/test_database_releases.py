"""A database of another release: the service that starts brings it up to date, and nothing beside it does."""

import sqlite3

import pytest
from alembic import command
from alembic.config import Config

from deltaguard.cli.app import run
from deltaguard.service import database
from deltaguard.service.server import open_service


def put_back(data, revision):
    """Give a folder the database of an earlier release."""
    config = Config()
    config.set_main_option("script_location", str(database.Path(database.__file__).parent / "migrations"))
    engine = database.create_engine(database.database_url(data, None))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


def revision_of(data):
    with sqlite3.connect(data / "service.sqlite") as connection:
        ((found,),) = connection.execute("SELECT version_num FROM alembic_version")
    connection.close()
    return found


@pytest.mark.parametrize("verb", [("keys", "list"), ("keys", "create", "acme"), ("gc",)])
def test_what_runs_beside_an_older_service_leaves_its_database_as_it_is(verb, tmp_path, settings, capsys):
    put_back(tmp_path, "0002")
    assert run([*verb, "--data", str(tmp_path)]) == 1
    assert "Only `deltaguard serve` brings it up to date" in " ".join(capsys.readouterr().err.split())
    assert revision_of(tmp_path) == "0002"
    assert open_service(tmp_path, settings).first_key
    assert revision_of(tmp_path) > "0002"
    assert run(["keys", "list", "--data", str(tmp_path)]) == 0


def test_a_later_releases_database_is_told(tmp_path, settings, capsys):
    open_service(tmp_path, settings)
    with sqlite3.connect(tmp_path / "service.sqlite") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    assert run(["keys", "list", "--data", str(tmp_path)]) == 1
    assert "is of a later release" in " ".join(capsys.readouterr().err.split())
