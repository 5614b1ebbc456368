"""A SentencePiece model (tokenizer.model) as a fast tokenizer, built without its remote code.

InternLM2's tokenizer class is Python code that lies beside the weights. What it computes is decided
by two files, which are all that is read here: tokenizer.model (the pieces and their scores) and
tokenizer_config.json (which ids carry another text than their piece, such as <|im_start|>).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

from emloc.files import read_json

_BPE = 2  # TrainerSpec.model_type
_USER_DEFINED = 4  # SentencePiece.type: always a token of its own


def fast_tokenizer(folder: Path, **attributes: Any) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a folder that has tokenizer.model and tokenizer_config.json.

    `attributes` go to the tokenizer's class.

    Raises:
        ValueError: the model cannot be read, is not byte-pair encoding, or the added tokens leave
            a gap in the ids.
    """
    file = folder / "tokenizer.model"
    proto = _read(file)
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    added = _added_tokens(config, folder)
    core = _core(proto, added)
    for number, token in sorted(added.items()):
        core.add_tokens([token])
        if core.token_to_id(token.content) != number:
            raise ValueError(
                f"The token {token.content!r} of {folder} should be number {number}, but would be "
                f"{core.token_to_id(token.content)}: copy or download the tokenizer files again."
            )
    named = {key: _text(config.get(key, default)) for key, default in _NAMED.items()}
    core.post_processor = _begin_and_end(core, config, named["bos_token"], named["eos_token"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        model_max_length=config.get("model_max_length"),
        **named,
        **attributes,
    )


_NAMED = {
    "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>",
}  # fmt: skip


def _text(token: str | dict[str, Any]) -> str:
    return token["content"] if isinstance(token, dict) else token


def _read(file: Path) -> Any:
    """The parsed model.

    Raises:
        ValueError: it is none, or no byte-pair encoding.
    """
    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's own class differs between its implementations
        raise ValueError(
            f"The file {file} is no SentencePiece model ({error}): copy or download it again."
        ) from error
    if proto.trainer_spec.model_type != _BPE or not proto.pieces:
        raise ValueError(
            f"The file {file} is no byte-pair encoding, which InternLM2 and Llama use: copy or "
            "download it again."
        )
    return proto


def _added_tokens(config: dict[str, Any], folder: Path) -> dict[int, AddedToken]:
    """Token number → token, from tokenizer_config.json, or from the older added_tokens.json."""
    if stored := config.get("added_tokens_decoder"):
        return {
            int(number): AddedToken(
                token["content"],
                lstrip=token.get("lstrip", False),
                rstrip=token.get("rstrip", False),
                single_word=token.get("single_word", False),
                normalized=False,
                special=token.get("special", True),
            )
            for number, token in stored.items()
        }
    older = folder / "added_tokens.json"
    numbers: dict[str, int] = read_json(older) if older.is_file() else {}
    return {
        number: AddedToken(text, special=True, normalized=False) for text, number in numbers.items()
    }


def _core(proto: Any, added: dict[int, AddedToken]) -> Tokenizer:
    """The byte-pair encoding: pieces by number, renamed where an added token has that number."""
    texts = [
        added[number].content if number in added else piece.piece
        for number, piece in enumerate(proto.pieces)
    ]
    vocabulary = {text: number for number, text in enumerate(texts)}
    apart = {
        text
        for number, (text, piece) in enumerate(zip(texts, proto.pieces, strict=True))
        if number in added or piece.type == _USER_DEFINED
    }
    scores = {text: piece.score for text, piece in zip(texts, proto.pieces, strict=True)}
    core = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=generate_merges(vocabulary, scores, skip_tokens=apart),
            unk_token=texts[proto.trainer_spec.unk_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.insert(0, normalizers.Prepend("▁"))
    core.normalizer = normalizers.Sequence(steps)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    core.add_tokens(
        [
            AddedToken(text, normalized=False, special=False)
            for number, text in enumerate(texts)
            if text in apart and number not in added
        ]
    )
    return core


def _begin_and_end(
    core: Tokenizer, config: dict[str, Any], begin: str, end: str
) -> processors.TemplateProcessing:
    """Put the begin token before every text, and the end token after it, where the config says."""
    before = [begin] if config.get("add_bos_token", True) else []
    after = [end] if config.get("add_eos_token", False) else []
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B", *after],
        special_tokens=[(text, core.token_to_id(text)) for text in {*before, *after}],
    )
