"""Where a checkpoint's tensors go in a loaded model, and why some do not go anywhere."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.checkpoint import Checkpoint, WeightSource
from deltaguard.models.experts import Part, parts_of
from deltaguard.models.families import is_parameter, is_unread, list_of_block

Places = Mapping[str, tuple[Tensor, ...]]
"""The fine-tuned checkpoint's names, and the model's parameters that each of them gives the values of."""


def match(model: Any, aligned: Checkpoint, finetuned: WeightSource) -> Places:
    """Find the places, and make the two embeddings as much or as little tied as the fine-tuned checkpoint's.

    What a text does not reach, such as a tower that sees pictures, has none, and keeps the aligned weights.

    Args:
        model: holds the aligned model.
        aligned: the aligned checkpoint, for messages.
        finetuned: the fine-tuned one.

    Raises:
        DeltaguardError: a tensor has no place or another shape, or a parameter no tensor; all are listed.
    """
    own = _text_weights(model)
    parts = parts_of(list(own), finetuned.tensors)
    names = {part.tensor: place for place, known in parts.items() for part in known}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {place for place in own if own[place] is embedding.weight or own[place] is head.weight}
    # Where one of the two is not stored, loading ties them, whatever the aligned model does.
    one = len(ends & set(names.values())) == 1
    if not one and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
        own = _text_weights(model)
    places = {part.tensor: (part.of(own[place]),) for place, known in parts.items() for part in known}
    if one:
        places |= {name: (embedding.weight, head.weight) for name in names if names[name] in ends}
    covered = {
        id(own[place]) for place, known in parts.items() if _entries(known, own[place]) == own[place].numel()
    }
    if problems := list(_problems(model, finetuned, places, covered)):
        raise DeltaguardError(listed(f"{finetuned.reference} does not fit {aligned.reference}", problems))
    return places


def _text_weights(model: Any) -> dict[str, Tensor]:
    """Find parameters and buffers of the decoder and of both embeddings, by their names in the model."""
    parts = model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()
    read = {id(each) for part in parts for each in part.state_dict(keep_vars=True).values()}
    return {name: each for name, each in model.state_dict(keep_vars=True).items() if id(each) in read}


def _entries(parts: Sequence[Part], parameter: Tensor) -> int:
    return sum(part.of(parameter).numel() for part in parts)


def _problems(model: Any, finetuned: WeightSource, places: Places, covered: Collection[int]) -> Iterator[str]:
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    growing = {id(parameter) for end in ends for parameter in end.parameters()}
    lists = {list_of_block(name) for name in places} - {None}
    for name, info in finetuned.tensors.items():
        # Attention masks that old checkpoints hold have four dimensions, and are no weights.
        counts = (len(info.shape) == 2 or is_parameter(name)) and not is_unread(finetuned.config, name)
        if name not in places and counts and list_of_block(name) in lists:
            yield f"`{name}`, {info.shape}, has no counterpart in the model"
        for shape, place in ((tuple(place.shape), place) for place in places.get(name, ())):
            larger = id(place) in growing and info.shape[1:] == shape[1:] and info.shape > shape
            if info.shape != shape and not larger:
                yield f"`{name}` is {info.shape}, and {shape} in the model"
    known = {*covered, *(id(place) for group in places.values() for place in group)}
    for name, parameter in _text_weights(model).items():
        if isinstance(parameter, nn.Parameter) and id(parameter) not in known:
            yield f"`{name}`, {tuple(parameter.shape)}, is in the model only"


@torch.no_grad()
def grow(finetuned: WeightSource, places: Places) -> None:
    """Give the model the rows that only the fine-tuned vocabulary has; what is tied stays tied.

    Args:
        finetuned: holds the rows.
        places: of its tensors.
    """
    for name, place in ((name, place) for name, group in places.items() for place in group):
        if finetuned.tensors[name].shape != tuple(place.shape):
            place.data = torch.cat([place, finetuned.read(name)[len(place) :].to(place)])
