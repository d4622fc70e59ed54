"""Models that can be asked: aligned ones of the settings, and those that an organisation's jobs published."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi import Path as InPath
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.orm import Session

from deltaguard.files import read_json
from deltaguard.models.adapter import is_adapter
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.reports.records.restore import REPORT_NAME
from deltaguard.service.context import Asking, Caller, Open, Service
from deltaguard.service.errors import ApiError, not_found
from deltaguard.service.schemas import Deleted, ModelObject, Page
from deltaguard.service.tables import Model

router = APIRouter(prefix="/v1/models", tags=["models"])

Name = Annotated[str, InPath(max_length=300)]
_OPERATOR = "operator"


@dataclass(frozen=True)
class Folders:
    """Where a model lies that can be asked.

    Attributes:
        model: folder or Hub id of its weights; for an adapter those of the aligned model.
        adapter: folder of the adapter over it, None where there is none.
    """

    model: str
    adapter: str | None


def find_model(session: Session, caller: Caller, name: str) -> Model:
    """Find a model that an organisation's job published.

    Raises:
        ApiError: there is none of that name, or it is another organisation's.
    """
    found = session.scalar(select(Model).where(Model.id == name, Model.organisation == caller.organisation))
    if found is None:
        raise not_found("model", name)
    return found


def find_folders(service: Service, caller: Caller, name: str) -> Folders:
    """Find where a model lies that somebody asks.

    Raises:
        ApiError: there is none of that name for them.
    """
    aligned = service.settings.models
    if name in aligned:
        return Folders(aligned[name], None)
    with service.sessions.reading() as session:
        found = find_model(session, caller, name)
    folder = service.published(found.job_id)
    if not is_adapter(folder):
        return Folders(str(folder), None)
    if found.base not in aligned:
        message = f"{name} is over {found.base}, which this service has no more."
        raise ApiError(503, message, code="base_model_missing", retry_after=60)
    if _restored_over(service, folder) != _identity(service, aligned[found.base]):
        message = f"{name} was made over another {found.base} than this service has now."
        raise ApiError(503, message, code="base_model_missing", retry_after=60)
    return Folders(aligned[found.base], str(folder))


class _Aligned(BaseModel):
    fingerprint: str


class _Restored(BaseModel):
    """What must be known of a restore."""

    aligned: _Aligned


def _restored_over(service: Service, folder: Path) -> str:
    """Find the weights over which an adapter was restored, and which the gate asked."""
    name = str(folder)
    if name not in service.identities:
        report = read_json(folder / REPORT_NAME, _Restored, remedy="The restore writes it.")
        service.identities[name] = report.aligned.fingerprint
    return service.identities[name]


def _identity(service: Service, reference: str) -> str:
    opened = service.aligned.get(reference)
    # Weights may be replaced while the service runs: models are loaded when they are asked.
    if reference not in service.identities or (opened is not None and opened.changes()):
        opened = Checkpoint.open(reference)
        service.identities[reference] = opened.fingerprint()
        # Last: until then others look for themselves.
        service.aligned[reference] = opened
    return service.identities[reference]


def _show(model: Model) -> ModelObject:
    return ModelObject(id=model.id, created=model.created_at, owned_by=model.organisation)


def _show_aligned(service: Service, name: str) -> ModelObject:
    return ModelObject(id=name, created=service.opened_at, owned_by=_OPERATOR)


@router.get("")
def list_models(service: Open, caller: Asking) -> Page[ModelObject]:
    """List all models that the caller can ask."""
    query = select(Model).where(Model.organisation == caller.organisation).order_by(Model.number)
    with service.sessions.reading() as session:
        own = [_show(model) for model in session.scalars(query)]
    return Page(
        data=[*(_show_aligned(service, name) for name in service.settings.models), *own], has_more=False
    )


@router.get("/{name:path}")
def retrieve_model(service: Open, caller: Asking, name: Name) -> ModelObject:
    """Describe a model."""
    if name in service.settings.models:
        return _show_aligned(service, name)
    with service.sessions.reading() as session:
        return _show(find_model(session, caller, name))


@router.delete("/{name:path}")
def delete_model(service: Open, caller: Asking, request: Request, name: Name) -> Deleted:
    """Remove a published model for good."""
    if name in service.settings.models:
        message = f"{name} is the operator's, and cannot be deleted."
        raise ApiError(403, message, code="not_yours", param="model")
    with service.sessions.begin() as session:
        found = find_model(session, caller, name)
        session.delete(found)
    folder = service.published(found.job_id)
    if is_adapter(folder):
        request.app.state.inference.forget(str(folder))
    shutil.rmtree(folder, ignore_errors=True)
    return Deleted(id=name, object="model")
