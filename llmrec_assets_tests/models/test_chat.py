"""The chat rendering that training, sampling and evaluation share."""

import pytest

from llmrec_assets.models.chat import completion_ids, prompt_ids, render_prompt, stop_ids
from llmrec_assets.models.tiny import tiny_llama, tiny_tokenizer

TEXTS = ["Star Wars (1977)", "Schindler's List (1993)", "Recommend films.", '["A", "B"]']

# The shape of Llama 3.2's template: it prints the day unless it is told one.
DATED = (
    "{% if not date_string %}{{ raise_exception('the day would change the prompt') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ date_string }}\n{{ m['content'] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {{ date_string }}\n"
    "{% endif %}"
)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer(TEXTS, vocab_size=300)


def test_prompt_and_completion_join_to_the_rendered_conversation(tokenizer) -> None:
    prompt, completion = "Name a film.", '["Schindler\'s List (1993)"]'
    joined = prompt_ids(tokenizer, prompt) + completion_ids(tokenizer, prompt, completion)
    assert tokenizer.decode(joined) == (
        "<|im_start|>user\nName a film.<|im_end|>\n<|im_start|>assistant\n"
        '["Schindler\'s List (1993)"]<|im_end|>'
    )


def test_completion_ends_in_the_end_of_turn_token(tokenizer) -> None:
    assert completion_ids(tokenizer, "q", "a")[-1] == tokenizer.eos_token_id


def test_the_day_of_rendering_is_pinned(tokenizer) -> None:
    tokenizer.chat_template = DATED
    assert "26 Jul 2024" in render_prompt(tokenizer, "q")


def test_a_template_without_a_prompt_prefix_is_refused(tokenizer) -> None:
    tokenizer.chat_template = (
        "{% if add_generation_prompt %}Q{% else %}A{% endif %}{{ messages[0]['content'] }}"
    )
    with pytest.raises(ValueError, match="prefix"):
        completion_ids(tokenizer, "q", "a")


def test_stop_ids_join_tokenizer_model_and_template(tokenizer) -> None:
    model = tiny_llama(tokenizer, seed=0)
    model.generation_config.eos_token_id = [7, tokenizer.eos_token_id]
    assert stop_ids(tokenizer, model) == sorted({7, tokenizer.eos_token_id})
