"""A service without processes of its own, and clients of it."""

import sys
from pathlib import Path

import pytest
from fsspec import filesystem, get_filesystem_class
from moto.server import ThreadedMotoServer
from starlette.testclient import TestClient

sys.path.insert(0, str(Path(__file__).parent))

from clients import LIMITS, client_of  # found by the line above

from deltaguard.service.app import make_app
from deltaguard.service.inference import Inference
from deltaguard.service.keys import create_key
from deltaguard.service.server import open_service
from deltaguard.service.settings import Settings
from service_pages import Begun


@pytest.fixture
def settings():
    return Settings(models={"tiny": "nowhere", "org/other": "nowhere"}, limits=LIMITS)


@pytest.fixture
def opened(tmp_path, settings):
    found = open_service(tmp_path / "data", settings)
    yield found
    found.service.sessions.kw["bind"].dispose()


@pytest.fixture
def begun():
    return Begun()


@pytest.fixture
def http(opened, begun, tmp_path):
    inference = Inference(tmp_path / "chat.log", device="cpu", most_waiting=1)
    return TestClient(make_app(opened.service, begun, inference), raise_server_exceptions=False)


@pytest.fixture
def client(http, opened):
    """Of the operator, whose key was made first."""
    return client_of(http, opened.first_key)


@pytest.fixture
def stranger(http, opened):
    """Of a customer of another organisation."""
    with opened.service.sessions.begin() as session:
        return client_of(http, create_key(session, "others"))


@pytest.fixture
def object_store(monkeypatch):
    """A server that speaks S3's protocol, with a bucket, and the one that s3fs finds."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    told = {"ENDPOINT_URL": address, "ACCESS_KEY_ID": "deltaguard", "SECRET_ACCESS_KEY": "hidden-word"}
    for name, value in (told | {"DEFAULT_REGION": "us-east-1", "MAX_ATTEMPTS": "1"}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    # It keeps connections to servers of tests before.
    get_filesystem_class("s3").clear_instance_cache()
    filesystem("s3").mkdirs("bucket", exist_ok=True)
    yield server
    server.stop()
