"""Contents of files, in a folder and in an object store of fsspec."""

import io
import json
import os
from pathlib import Path
from uuid import uuid4

import openai
import pytest
from clients import LIMITS, ROW, uploaded

from deltaguard.errors import DeltaguardError
from deltaguard.service.contents import UnavailableError, open_contents
from deltaguard.service.server import open_service
from deltaguard.service.settings import Limits, Settings


@pytest.fixture(params=["folder", "s3"])
def url(request):
    if request.param == "folder":
        return None
    request.getfixturevalue("object_store")
    # What a server keeps outlives it, in this process.
    return f"s3://bucket/{uuid4().hex}"


@pytest.fixture
def settings(url):
    return Settings(models={"tiny": "nowhere"}, limits=LIMITS, files_url=url)


@pytest.fixture
def contents(url, tmp_path):
    (tmp_path / "files").mkdir()
    return open_contents(tmp_path, url)


def test_what_is_kept_comes_back(contents, tmp_path):
    # More than a part of an upload to S3.
    content = bytes(range(256)) * 250_000
    assert contents.put("file-1", io.BytesIO(content)) == len(content)
    assert b"".join(contents.parts("file-1")) == content
    assert contents.fetch("file-1", tmp_path / "job").read_bytes() == content
    assert contents.fetch("file-1", tmp_path / "job").read_bytes() == content
    (found,) = contents.all()
    assert (found.name, found.bytes) == ("file-1", len(content))
    assert found.changed_at > 1_700_000_000
    contents.remove("file-1")
    contents.remove("file-1")
    assert not list(contents.all())
    with pytest.raises(FileNotFoundError):
        contents.fetch("file-1", tmp_path / "another")


@pytest.mark.parametrize("url", ["folder"], indirect=True)
def test_a_content_is_on_disk_before_it_has_its_name_and_both_before_it_counts_as_kept(
    contents, tmp_path, monkeypatch
):
    steps, rename = [], Path.replace

    def flushed(descriptor):
        found = os.fstat(descriptor)
        steps.append(("flush", found.st_ino, found.st_size))

    def renamed(path, target):
        steps.append(("rename", path.stat().st_ino, target))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    contents.put("file-1", io.BytesIO(b"content"))
    kept = tmp_path / "files" / "file-1"
    file, folder = (path.stat() for path in (kept, kept.parent))
    assert steps == [
        ("flush", file.st_ino, len(b"content")),
        ("rename", file.st_ino, kept),
        ("flush", folder.st_ino, folder.st_size),
    ]


@pytest.mark.parametrize("url", ["bucket"], indirect=True)
def test_a_content_that_was_fetched_is_durable(contents, tmp_path, monkeypatch):
    contents.put("file-1", io.BytesIO(b"content"))
    durable = {}

    def flushed(descriptor):
        found = os.fstat(descriptor)
        durable[found.st_ino] = found.st_size

    monkeypatch.setattr(os, "fsync", flushed)
    file = contents.fetch("file-1", tmp_path / "job")
    assert durable[file.stat().st_ino] == len(b"content")
    assert file.parent.stat().st_ino in durable


class Cut(io.RawIOBase):
    """An upload that is cut off."""

    left = 60

    def read(self, count=-1):
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("cut off")
        # So much that a part of it is on its way to S3.
        return bytes(count)


def test_what_was_cut_off_is_not_kept(contents, tmp_path):
    with pytest.raises((ConnectionError, DeltaguardError)):
        contents.put("file-1", Cut())
    with pytest.raises(FileNotFoundError):
        contents.fetch("file-1", tmp_path / "job")
    assert not list(contents.all())
    assert not list((tmp_path / "job").glob("*"))


def test_a_place_is_one_services(url, settings, tmp_path):
    first, other = (open_contents(tmp_path, url) for _ in range(2))
    if url is None:
        first.require_owner("service-1")
        return
    with pytest.raises(DeltaguardError, match="start this one with it first"):
        first.require_owner("service-1")
    first.require_owner("service-1", claims=True)
    first.put("file-1", io.BytesIO(b"content"))
    first.require_owner("service-1")
    assert [each.name for each in first.all()] == ["file-1"]
    for claims in (False, True):
        with pytest.raises(DeltaguardError, match="another service's"):
            other.require_owner("service-2", claims=claims)
    with pytest.raises(DeltaguardError, match="another service's"):
        open_service(tmp_path / "data", settings)


def test_a_store_that_is_not_known_is_told(tmp_path):
    with pytest.raises(DeltaguardError, match="files_url"):
        open_contents(tmp_path, "nonsense://bucket")


class TestThroughTheService:
    @pytest.fixture
    def opened(self, tmp_path, url):
        limits = LIMITS.model_copy(update={"all_bytes": 250})
        settings = Settings(models={"tiny": "nowhere"}, limits=limits, files_url=url)
        found = open_service(tmp_path / "data", settings)
        yield found
        found.service.sessions.kw["bind"].dispose()

    def test_files_go_there_and_come_back(self, client, opened):
        file = uploaded(client)
        assert json.loads(client.files.content(file.id).read()) == ROW
        assert [content.name for content in opened.service.contents.all()] == [file.id]
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        assert json.loads(opened.service.fetched(job.id, file.id).read_bytes()) == ROW
        client.fine_tuning.jobs.cancel(job.id)
        client.files.delete(file.id)
        assert not list(opened.service.contents.all())

    def test_an_organisations_files_are_limited_in_all(self, client, stranger, opened):
        first = uploaded(client)
        uploaded(client)
        with pytest.raises(openai.APIStatusError) as error:
            uploaded(client)
        assert (error.value.status_code, error.value.code) == (413, "storage_full")
        assert len(list(opened.service.contents.all())) == 2
        uploaded(stranger)
        client.files.delete(first.id)
        uploaded(client)


def test_a_disk_that_is_full_is_told_with_when_to_come_back(client, opened, monkeypatch):
    def full(*_):
        raise DeltaguardError("There is no space left for /secret/place.")

    monkeypatch.setattr(type(opened.service.contents), "put", full)
    with pytest.raises(openai.InternalServerError) as error:
        uploaded(client)
    assert (error.value.status_code, error.value.code) == (503, "unavailable")
    assert error.value.response.headers["retry-after"] == "30"
    assert "/secret" not in error.value.message


def test_limits_of_an_organisation_have_defaults():
    assert Limits().all_bytes >= Limits().file_bytes


def test_a_bucket_that_is_missing_is_no_outage(object_store, tmp_path):
    contents = open_contents(tmp_path, "s3://another-bucket/files")
    with pytest.raises(DeltaguardError, match="has no another-bucket/files") as error:
        contents.put("file-1", io.BytesIO(b"{}"))
    assert not isinstance(error.value, UnavailableError)


@pytest.mark.parametrize("url", ["folder", "s3"], indirect=True)
def test_a_content_that_was_removed_meanwhile_is_not_found(client, opened):
    file = uploaded(client)
    opened.service.contents.remove(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)


class TestWhileTheObjectStoreIsAway:
    @pytest.mark.parametrize("place", ["s3://bucket/files", "s3://bucket"])
    def test_every_use_of_it_is_an_error_of_ours(self, place, object_store, tmp_path):
        contents = open_contents(tmp_path, place)
        object_store.stop()
        uses = (
            lambda: contents.put("file-1", io.BytesIO(b"{}")),
            lambda: list(contents.parts("file-1")),
            lambda: contents.fetch("file-1", tmp_path / "job"),
            lambda: contents.remove("file-1"),
            lambda: list(contents.all()),
        )
        for use in uses:
            with pytest.raises(UnavailableError, match="does not answer"):
                use()
        assert not list((tmp_path / "job").glob("*"))

    @pytest.mark.parametrize("url", ["s3"], indirect=True)
    def test_clients_are_told_when_to_come_back(self, client, object_store):
        file = uploaded(client)
        object_store.stop()
        for ask in (lambda: uploaded(client), lambda: client.files.content(file.id)):
            with pytest.raises(openai.InternalServerError) as error:
                ask()
            assert (error.value.status_code, error.value.code) == (503, "unavailable")
            assert error.value.response.headers["retry-after"] == "30"
        assert [each.id for each in client.files.list()] == [file.id]
