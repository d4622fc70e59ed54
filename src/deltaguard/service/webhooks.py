"""Telling the operator's own server that a job has ended, signed as standardwebhooks.com says.

OpenAI's webhooks are signed likewise, so that `client.webhooks.unwrap` of the `openai` package checks and
reads what is sent. Only `service.yaml` names the server; a reply that leads elsewhere is not followed.
"""

import base64
import hashlib
import hmac
import json
import os
import time
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from typing_extensions import override

from deltaguard.errors import DeltaguardError
from deltaguard.service.settings import Webhook
from deltaguard.service.tables import Job

_PREFIX = "whsec_"
_LEAST_BYTES = 24
_TIMEOUT_S = 10


class UndeliveredError(DeltaguardError):
    """A message that the operator's server did not take; it is sent again later."""


def webhook_secret(webhook: Webhook) -> bytes:
    """Read the secret that messages are signed with.

    Raises:
        DeltaguardError: the environment holds none, or none of the scheme's form.
    """
    given = os.environ.get(webhook.key_env, "")
    try:
        secret = base64.b64decode(given.removeprefix(_PREFIX), validate=True)
    except ValueError:
        secret = b""
    if not given.startswith(_PREFIX) or len(secret) < _LEAST_BYTES:
        raise DeltaguardError(
            f"`webhook` needs a secret in the environment variable {webhook.key_env}: {_PREFIX} and the "
            f"base64 of {_LEAST_BYTES} random bytes or more."
        )
    return secret


def message_of(job: Job, status: str) -> dict[str, Any]:
    """Write the message that a job has ended; the same one has the same id, however often it comes.

    Args:
        job: the job.
        status: `succeeded`, `failed` or `cancelled`; of a blocked model `failed`, with the gate's code.
    """
    code = job.error["code"] if status == "failed" and job.error is not None else None
    return {
        "id": f"evt_{job.id}_{status}",
        "object": "event",
        "created_at": job.finished_at or 0,
        "type": f"fine_tuning.job.{status}",
        "data": {"id": job.id, "organization_id": job.organisation, "code": code},
    }


def signed(secret: bytes, message_id: str, body: bytes, *, at: int) -> dict[str, str]:
    """Sign a message.

    Args:
        secret: shared with the receiver.
        message_id: of the message.
        body: what is sent.
        at: seconds since 1970; receivers refuse old messages.

    Returns:
        The headers that say so.

    Example:
        >>> signed(b"k" * 24, "msg_1", b"{}", at=1_700_000_000)["webhook-signature"]
        'v1,...'
    """
    digest = hmac.new(secret, f"{message_id}.{at}.".encode() + body, hashlib.sha256).digest()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(at),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


def deliver(webhook: Webhook, message: dict[str, Any]) -> None:
    """Send a message once.

    Raises:
        UndeliveredError: the server cannot be reached, or did not answer with 2xx; what is raised names
            neither its address nor the secret.
        DeltaguardError: there is no secret.
    """
    body = json.dumps(message).encode()
    headers = signed(webhook_secret(webhook), message["id"], body, at=int(time.time()))
    request = Request(  # noqa: S310  # settings take http and https alone
        str(webhook.url), body, {"Content-Type": "application/json", "User-Agent": "deltaguard", **headers}
    )
    try:
        with build_opener(_NoRedirects).open(request, timeout=_TIMEOUT_S):
            pass
    except HTTPError as error:
        raise UndeliveredError(f"The webhook answered with {error.code}.") from None
    except (OSError, HTTPException) as error:
        raise UndeliveredError(f"The webhook cannot be reached: {type(error).__name__}.") from None


class _NoRedirects(HTTPRedirectHandler):
    """Takes a reply that leads elsewhere for a refusal."""

    @override
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None
