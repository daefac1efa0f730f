"""`megarl markers`: what it finds of a model's template, tokenizer and responses, and that its lines are settings that
work. The templates are the parts of Qwen3's, DeepSeek-R1-distill's and Llama 3's that matter here; the tokenizers are
small. Not proven: that the advice makes any of these models better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megarl import cli, config
from megarl.markers import Response, words_of
from megarl.models.tokenizer import load_tokenizer
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.early_exit import plan

QUICKSTART = Path("examples/quickstart")
TEMPLATES = {
    "qwen3": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "r1_distill": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}"
    "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
    "llama": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "magistral": "{% for m in messages %}[INST]{{ m.content.split('[/THINK]')[-1] }}[/INST]{% endfor %}",
    "off": "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<think>\n\n</think>\n\n"
    "{% endif %}",
}
THOUGHT = "3 + 4 is 8.\n\nWait, 3 + 4 is 7. So it is 7. Wait, yes.\nAlternatively 4 + 3 is 7.\n</think>\n\n\\boxed{7}"


def tokenizer(template: str | None, *specials: str) -> PreTrainedTokenizerFast:
    """All bytes, "Wait" in one token with and without its blank, and the special tokens."""
    merges = [("W", "a"), ("i", "t"), ("Wa", "it"), ("Ġ", "Wait")]
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", bos_token="<bos>")
    made.add_special_tokens({"additional_special_tokens": list(specials)})
    made.chat_template = template
    return made


def saved(folder: Path, template: str | None, *specials: str) -> Path:
    tokenizer(template, *specials).save_pretrained(folder)
    return folder


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`megarl markers …` in this process: its exit code."""

    def run(*words: object) -> int:
        monkeypatch.setattr("sys.argv", ["megarl", "markers", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0)

    return run


@pytest.fixture
def found(call, tmp_path: Path):
    """What `megarl markers …` writes with --json, its lines as a tree too."""

    def run(*words: object) -> dict[str, Any]:
        assert call(*words, "--json", tmp_path / "found.json") == 0
        made = json.loads((tmp_path / "found.json").read_text())
        return made | {"settings": yaml.safe_load(made["yaml"])}

    return run


def check_settings(folder: Path, lines: str, tmp_path: Path) -> config.Settings:
    """The lines, with what every run needs, are settings that early exit accepts for this tokenizer."""
    file = tmp_path / "train.yaml"
    file.write_text(f"run: {tmp_path / 'run'}\nmodel: {{path: {folder}}}\ndata: {{train: [x.jsonl]}}\n{lines}\n")
    settings = config.load(file)
    plan.check(settings.rollout, load_tokenizer(folder))
    return settings


@pytest.mark.parametrize(
    ("name", "specials", "recipe", "thinking", "end", "note"),
    [
        ("qwen3", ["<think>", "</think>"], "step_grpo", "the model opens", '1 token: ["</think>"]', None),
        ("r1_distill", ["</think>"], "step_grpo_r1_distill", "the prompt opens", '1 token: ["</think>"]', None),
        ("llama", [], "step_grpo_llama", "has no thought", "8 tokens", "system_prompt asks for a thought"),
        ("magistral", ["[THINK]", "[/THINK]"], "step_grpo", "the model opens", '1 token: ["[/THINK]"]', None),
        ("off", [], "step_grpo", "switched off", "8 tokens", "take one that does not"),
    ],
)
def test_a_template_gets_the_recipe_that_fits_it(
    name: str, specials: list[str], recipe: str, thinking: str, end: str, note: str | None, found, tmp_path: Path
) -> None:
    """And the printed lines, under that recipe, pass the checks that precede a run with this tokenizer."""
    folder = saved(tmp_path / name, TEMPLATES[name], *specials)
    made = found(folder)
    think_end = "[/THINK]" if name == "magistral" else "</think>"
    assert made["settings"]["recipe"] == recipe
    assert thinking in made["facts"]["thinking"]
    assert made["facts"][think_end].startswith(end)
    assert [note in each for each in made["notes"]] == ([True] if note else [])
    settings = check_settings(folder, made["yaml"], tmp_path)
    exits = settings.rollout.early_exit
    assert exits.enabled and exits.markers == ["Wait"] and settings.reward.shaping == "step_aware"
    assert (exits.think_end, exits.closing) == (think_end, f"\n{think_end}\n\n")
    assert exits.averaging == ("arithmetic" if name == "r1_distill" else "geometric")
    assert ("<think>" in (settings.data.system_prompt or "")) == (name == "llama")


def test_the_defaults_are_right_for_qwen3(found, tmp_path: Path) -> None:
    """Nothing of early exit but the markers needs a line; the prompt ends where Qwen3 starts to think."""
    made = found(saved(tmp_path / "qwen3", TEMPLATES["qwen3"], "<think>", "</think>"))
    assert made["settings"] == {"recipe": "step_grpo", "rollout": {"early_exit": {"markers": ["Wait"]}}}
    assert made["facts"]["prompts end with"].endswith("<|im_start|>assistant\\n'")


def test_words_are_counted_as_the_rollout_finds_them() -> None:
    """Stand-alone and case-sensitive; at the beginning of a line or of a sentence, or not."""
    texts = ["Wait, no. Waiting, await.\n**Wait** a bit. I say Wait", "But wait! Hmm", "So 1 + 1. We do So what"]
    rows = {row["word"]: row for row in words_of([Response(text) for text in texts], Vocabulary(tokenizer(None)))}
    assert list(rows) == ["Wait", "So", "But wait", "Hmm", "But"]
    assert {name: (row["uses"], row["begin a step"], round(row["share"], 2)) for name, row in rows.items()} == {
        "Wait": (3, 2, 0.33), "So": (2, 1, 0.33), "But wait": (1, 1, 0.33), "Hmm": (1, 1, 0.33), "But": (1, 1, 0.33),
    }  # fmt: skip
    assert rows["Wait"]["after a blank"] == [" Wait"]
    assert rows["Wait"]["after a line end"] == ["\n", "Wait"]
    assert rows["Hmm"]["after a blank"] == [" ", "H", "m", "m"]


@pytest.mark.parametrize(
    ("texts", "markers", "note"),
    [
        ([THOUGHT, "7\n</think>\n\n7"], ["Wait", "Alternatively"], None),
        (["Wait" * 2 + "\n</think>\n\n7", "So 7.\nSo it is.</think>"], ["So"], "seldom look back, and So begins"),
        (["7</think>"], ["Wait"], "none of these words"),
        ([THOUGHT.replace("</think>", ""), THOUGHT, "7", "8"], ["Wait", "Alternatively"], "1 of 4 finished responses"),
    ],
)
def test_responses_choose_the_markers(
    texts: list[str], markers: list[str], note: str | None, found, tmp_path: Path
) -> None:
    """Reflections in common use; a word that begins steps where there are none; a warning where early exit is of no
    use, or would write </think> into answers that never had one."""
    responses = write(tmp_path / "responses.jsonl", *({"response": text} for text in texts))
    folder = saved(tmp_path / "model", TEMPLATES["qwen3"], "<think>", "</think>")
    made = found(folder, "--responses", responses)
    assert made["settings"]["rollout"]["early_exit"]["markers"] == markers
    assert [note in each for each in made["notes"]] == ([True] if note else [])
    check_settings(folder, made["yaml"], tmp_path)


def test_responses_come_in_many_forms(found, tmp_path: Path) -> None:
    """Bare texts, columns, chat messages; of a run its newest step, where a response that was cut short may be open."""
    folder = saved(tmp_path / "model", TEMPLATES["qwen3"], "<think>", "</think>")
    reply = [{"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": THOUGHT}]
    rows = [THOUGHT, {"completion": THOUGHT}, {"messages": reply}, {"completion": reply[1:]}]
    made = found(folder, "--responses", write(tmp_path / "responses.jsonl", *rows))
    assert made["facts"]["responses"].startswith("4, 4 close a thought")
    assert made["words"][0] | {"uses": 8, "share": 1.0} == made["words"][0]
    rollouts = tmp_path / "run" / "rollouts"
    rollouts.mkdir(parents=True)
    write(rollouts / "step_000001.jsonl", {"response": "8", "finish": "stop"})
    open_ended = [{"response": "Wait, 7", "finish": "length"}] * 3
    write(rollouts / "step_000002.jsonl", {"response": THOUGHT, "finish": "stop"}, *open_ended)
    made = found(folder, "--responses", tmp_path / "run")
    assert made["facts"]["responses"].startswith("4, 1 close a thought")
    assert made["notes"] == []


@pytest.mark.slow
def test_the_quick_starts_reasoner_gets_the_quick_starts_settings(found, tmp_path: Path, capsys) -> None:
    """From its prompts, which the embedded engine answers: a table, then the lines, which are those of train.yaml."""
    prompts = QUICKSTART / "problems" / "train.jsonl"
    made = found(QUICKSTART / "reasoner", "--prompts", prompts, "--samples", 8, "--tokens", 160)
    shipped = yaml.safe_load((QUICKSTART / "train.yaml").read_text())["rollout"]["early_exit"]
    lines = made["settings"]["rollout"]["early_exit"]
    assert lines == {name: shipped[name] for name in ("markers", "inducer", "closing")}
    assert made["facts"]["thinking"] == "the prompt opens the thought"
    assert made["facts"]["responses"].startswith("8, ") and made["notes"] == []
    printed = capsys.readouterr().out
    assert "begin a step" in printed and printed.endswith(f"{made['yaml']}\n")
    check_settings(QUICKSTART / "reasoner", made["yaml"], tmp_path)


def test_a_base_model_is_told_how_to_prompt(found) -> None:
    """No chat template, and so none that could ask for a thought: the prompts must."""
    [note] = found(QUICKSTART / "reasoner")["notes"]
    assert "no chat template" in note and "end with <think>" in note


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["{model}", "--responses", "none.jsonl"], "--responses: none.jsonl does not exist"),
        (["{model}", "--responses", "{tmp}"], "step_000001.jsonl does not exist"),
        (["{model}", "--responses", "{tmp}/empty.jsonl"], "empty.jsonl has no rows"),
        (["{model}", "--responses", "{tmp}/odd.jsonl"], "odd.jsonl:2: no response in any of"),
        (["{model}", "--prompts", "none.jsonl"], "--prompts: none.jsonl does not exist"),
        (["{model}", "--prompts", "{tmp}/prompts.jsonl"], "no *.safetensors"),
    ],
)
def test_mistakes_are_one_line(words: list[str], complaint: str, call, tmp_path: Path, capsys) -> None:
    folder = saved(tmp_path / "model", TEMPLATES["llama"])
    write(tmp_path / "empty.jsonl")
    write(tmp_path / "odd.jsonl", {"response": "7"}, {"answer": "7"})
    write(tmp_path / "prompts.jsonl", {"prompt": "3 + 4?", "answer": "7"})
    assert call(*(word.format(model=folder, tmp=tmp_path) for word in words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("megarl: ") and complaint in line
