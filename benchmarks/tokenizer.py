"""A tokenizer for the synthetic models, trained on the package's prompts."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deltaguard.chat.conversations import build_conversations

_SPECIAL = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_TRAINED_ON = 512


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a byte-level tokenizer with a chat template.

    Args:
        folder: of the model.
        vocabulary: tokens at most.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = build_conversations(_TRAINED_ON)
    tokenizer.train_from_iterator((f"{row.system or ''}\n{row.prompt}" for row in rows), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_SPECIAL[0],
        eos_token=_SPECIAL[1],
        pad_token=_SPECIAL[1],
        additional_special_tokens=list(_SPECIAL[2:]),
    )
    wrapped.chat_template = _TEMPLATE
    wrapped.save_pretrained(folder)
