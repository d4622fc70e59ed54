"""Keys, passwords and secrets: in no log, and in nothing that is told."""

import logging

import openai
import pytest
from clients import client_of, uploaded

from deltaguard.cli.app import run
from deltaguard.service.tables import Key

PASSWORD = "pass-hidden-word"  # noqa: S105  # nobody's


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.1:1", "database does not answer"), (f"host:{PASSWORD}", "`database_url` is none")],
)
def test_a_database_that_cannot_be_had_is_told_without_its_password(tmp_path, capfd, address, message):
    url = f"postgresql://deltaguard:{PASSWORD}@{address}/name"
    (tmp_path / "service.yaml").write_text(f"database_url: '{url}'\n")
    assert run(["keys", "list", "--data", str(tmp_path)]) == 1
    told = capfd.readouterr()
    assert message in told.err
    assert PASSWORD not in told.out + told.err


def test_no_log_holds_a_key_whatever_goes_wrong(http, client, stranger, opened, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    uploaded(client)
    for key in ("dg-guess-of-somebody", stranger.api_key):
        with pytest.raises(openai.APIStatusError):
            client_of(http, key).files.retrieve("file-none")
    monkeypatch.setattr(type(opened.service.contents), "parts", lambda *_: 1 / 0)
    file = next(iter(client.files.list()))
    with pytest.raises(openai.InternalServerError) as error:
        client.files.content(file.id)
    with opened.service.sessions.begin() as session:
        hashes = list(session.scalars(Key.__table__.select().with_only_columns(Key.sha256)))
    assert "A bug" in caplog.text
    for secret in (opened.first_key, stranger.api_key, "dg-guess-of-somebody", *hashes):
        assert secret not in caplog.text
        assert secret not in str(error.value)
