"""Data sets whose prompts ask for another mark than a box: made-up rows in their layouts, read as training reads them,
and the grader of the recipe that belongs to them. Not proven: that a model follows the prompts."""

import json

import pytest
import yaml

from megarl import config
from megarl.config import reading
from megarl.data.prompts import read_prompts
from megarl.rewards.formats import answer_line, gsm8k
from megarl.rewards.grade import find
from tests.support.tiny_rollout import byte_level_tokenizer

LEAST = {"run": "r", "model": {"path": "m"}, "data": {"train": ["t.jsonl"]}}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
DAPO = {
    "data_source": "math_dapo",
    "prompt": [
        {
            "role": "user",
            "content": "Solve the problem step by step. The last line of your response should be of the form Answer: "
            "$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is $30 + 4$?\n\nRemember to "
            'put your answer on its own line after "Answer:".',
        }
    ],
    "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
}
GSM8K = {
    "question": "A shop sells 17 boxes of 100 pens. How many pens is that?",
    "answer": "There are 17 boxes.\n17*100=<<17*100=1700>>1700 pens.\n#### 1,700",
}
MATH = {"problem": "What is $\\frac14+\\frac14$?", "solution": "It is $\\boxed{\\frac12}$.", "level": "Level 1"}
CASES = {
    "dapo_math": (DAPO, "I add them.\nAnswer: $34$", ["\\boxed{34}", "The result is 34.", "Answer: 35", "Answer:"]),
    "gsm8k": (GSM8K, "17 times 100.\n#### 1700", ["1700", "\\boxed{1700}", "#### 170", "####"]),
    "boxed": (MATH, "It is \\boxed{0.5}.", ["0.5", "Answer: 0.5", "#### 0.5", "\\boxed{2}"]),
}


@pytest.mark.parametrize("recipe", CASES)
@pytest.mark.parametrize("thought", ["", "Is it 3? Answer: 3 #### 3 \\boxed{3}</think>\n\n"])
def test_a_recipe_grades_what_its_data_ask_for(recipe: str, thought: str, tmp_path) -> None:
    """The row's answer is found, the prompt that the model gets asks for the mark, a response with the right mark is
    right, and one with another mark or value is wrong."""
    row, right, wrongs = CASES[recipe]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    tokenizer = byte_level_tokenizer([])
    tokenizer.chat_template = TEMPLATE
    settings = config.parse({**LEAST, "recipe": f"grpo+{recipe}"})
    table, _ = read_prompts([tmp_path / "rows.jsonl"], tokenizer, settings.data)
    prompt, grade = table[0], find(settings.reward.function)
    mark = {"dapo_math": "Answer:", "gsm8k": "####", "boxed": "\\boxed"}[recipe]
    assert mark in prompt.text
    assert grade(thought + right, prompt.answer)
    for wrong in wrongs:
        assert not grade(thought + wrong, prompt.answer), wrong
    asks_for_a_box = "\\boxed" in prompt.text
    assert asks_for_a_box or settings.reward.alpha == 1.0  # no reward for a format that nobody asked for


def test_the_clusters_configurations_grade_what_their_data_ask_for() -> None:
    base = yaml.safe_load((reading.RECIPES.parents[1] / "slurm" / "configs" / "base.yaml").read_text())
    assert ["dapo-math" in file for file in base["data"]["train"]] == [True]
    assert len(base["data"]["eval"]) == 1  # several would be averaged into one accuracy
    wanted = reading.recipe("dapo_math")["reward"]
    assert base["reward"] == wanted


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("Answer: 34", "34", True),
        ("answer: 34.", "34", True),
        ("**Answer:** $34$", "34", True),
        ("**Answer: 34**", "34", True),
        ("### Final answer: \\(34\\)", "34", True),
        ("The final answer: 34", "34", True),
        ("Answer:\n34", "34", True),
        ("Answer: \\boxed{34}", "34", True),
        ("Answer: $\\boxed{34}$.", "34", True),
        ("Answer: 1\nNo.\nAnswer: 34", "34", True),
        ("Answer: 34\nNo.\nAnswer: 1", "34", False),
        ("Answer: $\\frac{1}{2}$", "0.5", True),
        ("Answer: -7", "-7", True),
        ("Answer: -7", "7", False),
        ("My answer is 34", "34", False),
        ("No answer: 34 is what I guess", "34", False),
        ("Answer: 3}4", "3", False),
        ("Answer: 34} and \\text{so", "34", False),
        ("Answer: 34</think>", "34", False),
        ("Answer: $", "34", False),
        ("", "34", False),
    ],
)
def test_answer_lines(response: str, answer: str, right: bool) -> None:
    assert answer_line(response, answer) is right


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("#### 72", "72", True),
        ("so\n####72.", "72", True),
        ("#### 1,000,000", "1000000", True),
        ("#### $1,000", "1000", True),
        ("#### 1\n#### 2", "2", True),
        ("#### 1\n#### 2", "1", False),
        ("#### 1,0", "10", False),
        ("72", "72", False),
    ],
)
def test_gsm8k_marks(response: str, answer: str, right: bool) -> None:
    assert gsm8k(response, answer) is right
