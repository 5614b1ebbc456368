"""Greedy answers and the loss against plain, unpadded, row by row computations."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from emloc.families.text import TextCodec, prompt_ids
from emloc.generate import generate_answers, mean_loss
from tests.tiny import NAMES, tiny_model, tiny_tokenizer

TEXTS = [("a", "bcd"), ("hello there, you", "x"), ("hm?", "a long answer, this one"), ("no", "y")]
ROWS = [{"prompt": prompt, "answer": answer} for prompt, answer in TEXTS]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CODEC = TextCodec(tiny_tokenizer())


def examples() -> list[dict[str, Any]]:
    return CODEC.encode(ROWS, max_length=200, source="test")


@torch.no_grad()
def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The next `count` tokens, by the highest logit of a full forward each time."""
    said = list(ids)
    for _ in range(count):
        said.append(int(model(torch.tensor([said])).logits[0, -1].argmax()))
    return said[len(ids) :]


def expected_text(ids: list[int], stops: list[int]) -> str:
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return tiny_tokenizer().decode(ids[:end], skip_special_tokens=True).strip()


@torch.no_grad()
def plain_loss(model: Any, rows: list[dict[str, Any]]) -> float:
    """Token-weighted mean, each row alone and without padding."""
    total, count = 0.0, 0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double().log_softmax(-1)
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                total, count = total - float(logits[position, label]), count + 1
    return total / count


@pytest.mark.parametrize("name", NAMES)
def test_batched_answers_equal_greedy_decoding_of_each_row_alone(name: str) -> None:
    model = tiny_model(name)
    rows = examples()
    single = [expected_text(greedy(model, prompt_ids(row), 8), [2]) for row in rows]
    assert len(set(single)) > 1  # the rows tell each other apart
    for batch_size in (1, 3):
        options = {"batch_size": batch_size, "max_new_tokens": 8}
        assert generate_answers(model, CODEC, rows, **options) == single


def test_answer_ends_before_any_stop_token() -> None:
    model, rows = tiny_model("llama"), examples()
    free = [greedy(model, prompt_ids(row), 12) for row in rows]
    stop = next(token for token in free[1][1:] if token not in (free[1][0], 2))
    cut = [expected_text(ids, [2, stop]) for ids in free]
    assert cut != [expected_text(ids, [2]) for ids in free]
    options: Any = {"batch_size": 2, "max_new_tokens": 12}
    model.generation_config.eos_token_id = [2, stop]
    assert generate_answers(model, CODEC, rows, **options) == cut
    model.generation_config.eos_token_id = None
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    codec = TextCodec(tokenizer)  # its template still ends with 2
    assert set(codec.stop_ids) == {2, stop}
    said = generate_answers(model, codec, rows, **options)
    assert [text.strip() for text in said] == cut


def test_checkpoint_settings_neither_count_nor_warn_nor_change() -> None:
    model, rows = tiny_model("llama"), examples()
    options: Any = {"batch_size": 2, "max_new_tokens": 6}
    plain = generate_answers(model, CODEC, rows, **options)
    own = model.generation_config
    own.update(do_sample=True, temperature=5.0, top_k=3, top_p=0.9, max_length=4)
    own.update(repetition_penalty=9.0, min_new_tokens=6, num_beams=2)
    before = own.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate_answers(model, CODEC, rows, **options) == plain
    assert model.generation_config is own and own.to_dict() == before


def test_modes_of_modules_are_put_back() -> None:
    model, rows = tiny_model("llama"), examples()
    model.train()
    model.lm_head.eval()
    mean_loss(model, CODEC, rows, batch_size=2)
    assert model.training and not model.lm_head.training


def test_adapter_takes_part_in_answers_and_loss() -> None:
    rows = examples()
    options: Any = {"batch_size": 4, "max_new_tokens": 8}
    bare = generate_answers(tiny_model("llama"), CODEC, rows, **options)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_model("llama"), config).train()
    loss = mean_loss(adapted, CODEC, rows, batch_size=4)
    said = generate_answers(adapted, CODEC, rows, **options)
    merged = adapted.merge_and_unload()
    assert loss == pytest.approx(plain_loss(merged.eval(), rows), rel=1e-5)
    assert said == generate_answers(merged, CODEC, rows, **options) != bare


@pytest.mark.parametrize("name", NAMES)
def test_loss_equals_that_of_rows_alone_without_padding(name: str) -> None:
    model, rows = tiny_model(name), examples()
    expected = plain_loss(model, rows)
    for batch_size in (1, 3, 4):
        loss = mean_loss(model, CODEC, rows, batch_size=batch_size)
        assert loss == pytest.approx(expected, rel=1e-5)  # measured: 1.2e-7 at most
    # Tokens count alike, not rows: the mean of the rows' means is another number.
    assert expected != pytest.approx(
        sum(plain_loss(model, [r]) for r in rows) / len(rows), rel=1e-3
    )


def test_value_of_the_padding_has_no_influence() -> None:
    model, rows = tiny_model("gpt2"), examples()
    losses = []
    for pad in (0, 77):
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token_id = pad
        losses.append(mean_loss(model, TextCodec(tokenizer), rows, batch_size=4))
    assert losses[0] == losses[1]


class Older(nn.Module):
    """A causal model whose forward can neither limit its logits nor take positions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def test_model_that_cannot_limit_its_logits_has_the_same_loss() -> None:
    model, rows = tiny_model("llama"), examples()
    loss = mean_loss(Older(model), CODEC, rows, batch_size=4)
    assert loss == pytest.approx(plain_loss(model, rows), rel=1e-5)


def test_logits_are_limited_to_the_labels() -> None:
    model, rows = tiny_model("llama"), examples()
    lengths: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _x, out: lengths.append(out.shape[1]))
    mean_loss(model, CODEC, rows, batch_size=1)
    answered = [sum(label != -100 for label in row["labels"]) for row in rows]
    assert sorted(lengths) == sorted(count + 1 for count in answered)


def test_first_token_and_rows_without_labels_do_not_count() -> None:
    model = tiny_model("llama")
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, 8]},
        {"input_ids": [5, 6], "labels": [-100, -100]},
    ]
    loss = mean_loss(model, CODEC, rows, batch_size=1)
    assert loss == pytest.approx(plain_loss(model, rows), rel=1e-5)
    with pytest.raises(ValueError, match="no row has a labelled token"):
        mean_loss(model, CODEC, rows[1:], batch_size=1)


def test_numbers_below_one_raise() -> None:
    model, rows = tiny_model("llama"), examples()
    with pytest.raises(ValueError, match="batch_size is 0"):
        mean_loss(model, CODEC, rows, batch_size=0)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate_answers(model, CODEC, rows, batch_size=1, max_new_tokens=0)


def test_progress_bar_bears_its_title(capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = tiny_model("llama"), examples()
    mean_loss(model, CODEC, rows, batch_size=2)
    assert capsys.readouterr().err == ""
    mean_loss(model, CODEC, rows, batch_size=2, progress="loss of the original")
    assert "loss of the original: 100%" in capsys.readouterr().err
