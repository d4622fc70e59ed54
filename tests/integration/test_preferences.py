"""A model learns which of two answers is preferred, and goes on where it was interrupted."""

import pytest
import torch
from safetensors.torch import load_file

from deltaguard.errors import DeltaguardError
from deltaguard.finetuning.finetune import FinetuneConfig
from deltaguard.finetuning.preferences import Preference, learn_preferences
from deltaguard.models.adapter import is_adapter
from pairs import pair

ROWS = [
    Preference(({"role": "user", "content": f"Cake number {n}?"},), preferred="Sure.", rejected="I cannot.")
    for n in range(8)
]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("rank", [None, 2])
def test_the_preferred_answer_becomes_likelier(rank, tmp_path):
    told = []
    config = FinetuneConfig(learning_rate=3e-2 if rank else 3e-3, epochs=3, lora_rank=rank)
    made = learn_preferences(
        pair().aligned,
        tmp_path / "out",
        ROWS,
        config=config,
        beta=0.5,
        validation=ROWS[:2],
        checkpoints=tmp_path / "states",
        on_step=told.append,
    )
    steps = [found for found in told if found.kind == "train"]
    assert [found.step for found in steps] == list(range(1, 7))
    assert steps[0].loss == pytest.approx(0.6931, abs=1e-3)  # log 2: neither answer is likelier yet
    assert steps[-1].loss < 0.6
    assert steps[-1].accuracy == 1
    assert [found.step for found in told if found.kind == "validation"] == [2, 4, 6]
    assert is_adapter(str(made)) == (rank is not None)
    if rank is None:
        name = "model.embed_tokens.weight"
        before, after = (load_file(folder / "model.safetensors")[name] for folder in (pair().aligned, made))
        assert torch.equal(before, after)
    again = []
    learn_preferences(
        pair().aligned,
        tmp_path / "again",
        ROWS,
        config=config,
        beta=0.5,
        checkpoints=tmp_path / "states",
        on_step=again.append,
    )
    assert not [found for found in again if found.kind == "train"]


def test_there_is_something_to_prefer(tmp_path):
    with pytest.raises(DeltaguardError, match="no pair"):
        learn_preferences(pair().aligned, tmp_path, [], config=FinetuneConfig(1e-3), beta=0.1)
    with pytest.raises(DeltaguardError, match="frozen_layers"):
        learn_preferences(
            pair().aligned, tmp_path, ROWS, config=FinetuneConfig(1e-3, frozen_layers=1), beta=0.1
        )
