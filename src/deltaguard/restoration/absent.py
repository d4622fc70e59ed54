"""What a fine-tuned checkpoint may do without of the aligned one, and what it must hold."""

from collections.abc import Callable, Mapping

from deltaguard.models.checkpoint import TensorInfo, WeightSource
from deltaguard.models.families import is_output_head, is_parameter, is_unread, list_of_block

LayerRule = Callable[[TensorInfo], tuple[str | None, bool] | None]
"""(curvature group, transposed) of an aligned tensor that is to be restored; None for the others."""


def find_absent(
    aligned: WeightSource, names: Mapping[str, str], layer: LayerRule
) -> tuple[tuple[str, ...], list[str]]:
    """Find parameters that the fine-tuned checkpoint does without, and say which it ought to hold.

    A text reaches what has curvature, the decoder's blocks, and what lies beside their list. Towers that see
    pictures, layers that predict further tokens and a tied output head may be absent.

    Args:
        aligned: the aligned checkpoint.
        names: of tensors that both have: fine-tuned name to aligned name.
        layer: says of an aligned tensor whether it is restored.

    Returns:
        Names of those that may be absent, and a sentence on each that may not.
    """
    found = set(names.values())
    restored = (list_of_block(name) for name in found if layer(aligned.tensors[name]))
    lists = {each for each in restored if each is not None}
    beside = tuple(each[: each.rstrip(".").rfind(".") + 1] for each in lists)
    absent: list[str] = []
    problems: list[str] = []
    for info in aligned.tensors.values():
        rule = layer(info)
        if info.name in found or not (rule or is_parameter(info.name)) or is_output_head(info.name):
            continue
        own, weighed = list_of_block(info.name), rule is not None and rule[0] is not None
        reached = weighed or not lists or (own in lists if own else info.name.startswith(beside))
        if reached and not is_unread(aligned.config, info.name):
            problems.append(
                f"Tensor `{info.name}` {info.shape} is in the aligned model and not in the fine-tuned one."
            )
        else:
            absent.append(info.name)
    return tuple(absent), problems
