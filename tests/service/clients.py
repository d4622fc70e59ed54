"""What tests of the service's HTTP share."""

import json

import openai

from deltaguard.service.settings import Limits
from deltaguard.service.tables import Model

ROW = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]}
LIMITS = Limits(file_bytes=50_000, unfinished_jobs=3, requests_per_minute=60)
ODD_NAME = '../../it\'s "a" 🙂.jsonl'


def client_of(http, key):
    return openai.OpenAI(api_key=key, base_url="http://testserver/v1", http_client=http, max_retries=0)


def uploaded(client, rows=(ROW,), name=ODD_NAME):
    return client.files.create(file=(name, "\n".join(map(json.dumps, rows)).encode()), purpose="fine-tune")


def publish(opened, job, name):
    folder = opened.service.published(job.id)
    folder.mkdir(parents=True)
    with opened.service.sessions.begin() as session:
        session.add(Model(id=name, organisation="default", base="tiny", job_id=job.id, step=3))
    return folder
