"""A Hub that keeps what is uploaded."""

from huggingface_hub.errors import LocalTokenNotFoundError

from deltaguard.curvature import store
from deltaguard.restoration import push

COMMIT = "https://hub/me/model/commit/1"


class Hub:
    """What `HfApi` would be asked."""

    def __init__(self):
        self.made, self.files, self.logged_in, self.is_private = [], {}, True, True

    def __call__(self, token=None):
        return self

    def whoami(self):
        if not self.logged_in:
            raise LocalTokenNotFoundError("there is no token")

    def create_repo(self, repo_id, *, private, exist_ok):
        self.whoami()
        assert exist_ok
        self.made.append((repo_id, private))

    def repo_info(self, repo_id):
        return type("Info", (), {"private": self.is_private})

    def list_repo_files(self, repo_id):
        self.whoami()
        return list(self.files)

    def create_commit(self, repo_id, operations, *, commit_message):
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return type("Commit", (), {"commit_url": COMMIT})

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        self.files = {name: (folder_path / name).read_bytes() for name in allow_patterns}
        return type("Commit", (), {"commit_url": COMMIT})


def played_hub(monkeypatch) -> Hub:
    """Have deltaguard upload to a played Hub."""
    played = Hub()
    for module in (push, store):
        monkeypatch.setattr(module, "HfApi", played)
    return played
