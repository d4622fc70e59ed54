"""Places of requests that models answer."""

import pytest

from deltaguard.service.errors import ApiError
from deltaguard.service.places import Places
from deltaguard.service.server import _answering
from deltaguard.service.settings import Limits, Settings


def test_one_organisation_leaves_places_to_others():
    places = Places(8)
    for _ in range(6):
        places.take("acme")
    with pytest.raises(ApiError, match="6 chats of this organisation") as refused:
        places.take("acme")
    assert refused.value.status == 429
    places.take("other")
    places.take("third")
    with pytest.raises(ApiError, match="Too many") as refused:
        places.take("other")
    assert refused.value.status == 503
    assert places.taken == 8
    for organisation in ("acme", "other", "third"):
        places.give_back(organisation)
    assert places.taken == 5
    places.take("acme")
    assert set(places._taken) == {"acme"}


@pytest.mark.parametrize(("most", "of_one"), [(1, 1), (2, 2), (4, 3), (32, 24)])
def test_where_there_are_few_one_may_have_all(most, of_one):
    assert Places(most).of_one == of_one


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:9/v1"], ids=["a process", "a server"])
def test_so_many_chats_may_wait_as_the_settings_say(url, tmp_path):
    settings = Settings(inference_url=url, limits=Limits(chat_waiting=5))
    assert _answering(tmp_path, settings)._places.most == 5
