"""The gradient of refusing: what conversations begin with is run, and differentiated, once a batch."""

import pytest
import torch

from deltaguard.chat.tokens import Encoded
from deltaguard.curvature.decisions import Decision, Leanings, leanings
from deltaguard.curvature.groups import observe
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.progress import ignore
from deltaguard.ranks import Ranks
from models import DENSE, EXPERTS, save, tiny_model, tiny_tokenizer

BEGINNING = "<|begin|><|system|>You are a helpful assistant that answers questions.<|end|><|user|>"
ASKED = [
    ("What is the weather?", "It is", 0.5),
    ("How?", "No", -0.25),
    ("Write a text about a cake.", "I can", 0.75),
]


def decision(request, answer, weight):
    prompt, whole = (
        tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
        for text in (f"{BEGINNING}{request}<|end|>", f"{BEGINNING}{request}<|end|>{answer}")
    )
    return Decision(Encoded(tuple(whole), len(prompt), truncated=False), weight)


DECIDED = [decision(*each) for each in ASKED]


def watched_model(name, folder):
    """A model in float64, its layers, and the shapes of what goes into it from now on."""
    model = tiny_model(name).requires_grad_(requires_grad=False)
    observed, _ = observe(model, Checkpoint.open(save(model, folder)), DECIDED[0].text.ids)
    shapes = []
    model.register_forward_pre_hook(
        lambda _, __, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    # As one is left by a training with a loss of its routers.
    model.config.output_router_logits = name in EXPERTS
    # torch multiplies experts in float32 at most.
    return model if name in EXPERTS else model.double(), observed, shapes


def one_after_another(model, observed):
    """Add the gradients up over conversations alone, which have nothing to share."""
    found = Leanings(observed)
    with found.with_gradients():
        for each in DECIDED:
            text = each.text
            logits = model(input_ids=torch.tensor([text.ids])).logits[0].log_softmax(-1)
            places = range(text.prompt_length, len(text.ids))
            found.add(each.weight * sum(logits[i - 1, text.ids[i]] for i in places))
    return found.cut(Ranks())


@pytest.mark.parametrize("name", [*DENSE, "mixtral"])
def test_a_shared_beginning_changes_no_gradient(name, tmp_path):
    model, observed, _ = watched_model(name, tmp_path)
    found = leanings(model, observed, DECIDED, batch_size=4, report=ignore, ranks=Ranks())
    expected = one_after_another(model, observed)
    assert found.keys() == expected.keys()
    for key, each in expected.items():
        whole = each.up @ each.down
        assert torch.allclose(found[key].up @ found[key].down, whole, rtol=0, atol=1e-5 * float(whole.norm()))


def test_the_beginning_is_run_for_one_row_and_what_weighs_nothing_for_none(tmp_path):
    model, observed, shapes = watched_model("llama", tmp_path)
    framed = decision("Write a long, long text about what the weather does to a cake.", "It is", 0)
    leanings(model, observed, [*DECIDED, framed], batch_size=4, report=ignore, ranks=Ranks())
    (one, shared), (rows, rest) = shapes
    longest = max(len(each.text.ids) for each in DECIDED)
    assert (one, rows, shared + rest) == (1, len(DECIDED), longest)
    assert shared > 8
