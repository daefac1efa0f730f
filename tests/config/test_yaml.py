"""What YAML, a shell or another editor makes of settings: read as it was meant, or refused in a line that says why."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megarl import config
from megarl.errors import UserError

BASE = "run: r\nmodel: {path: m}\ndata: {train: [a.jsonl]}\n"


def load(folder: Path, text: str | bytes, *overrides: str) -> config.Settings:
    file = folder / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else (BASE + text).encode())
    return config.load(file, list(overrides))


def refusal(folder: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: 1\nseed: 2\nsteps: 3\n", ["steps is given twice", "lines 4 and 6"]),
        ("batch: {prompts_per_step: 1, prompts_per_step: 2}\n", ["prompts_per_step", "lines 4 and 4"]),
        ("rollout:\n  early_exit:\n    strict: true\n    strict: false\n", ["strict", "lines 6 and 7"]),
        ("seed: 010\n", ["line 4", "010", "8", "quote"]),
        ("steps: 1:30\n", ["line 4", "1:30", "90", "base 60"]),
        ("steps: 1e3\n", ["steps", "'1e3'", "digits"]),
        ("steps: yes\n", ["steps: True", "yes", "not a number"]),
        ("optimizer: {lr: on}\n", ["optimizer.lr: True", "not a number"]),
        ("optimizer: {lr: .nan}\n", ["optimizer.lr: nan", "finite"]),
        ("optimizer: {lr: .inf}\n", ["optimizer.lr: inf", "finite"]),
        ("optimizer: {betas: [0.9, 1.5]}\n", ["optimizer.betas.1: 1.5", "less than 1"]),
        ("seed: -1\n", ["seed: -1", "greater than or equal to 0"]),
        (f"seed: {10**30}\n", ["seed", "out of range", "2147483647"]),
        ("rollout: {timeout: 1.0e+300}\n", ["rollout.timeout", "1e+300", "100000000"]),
        ("rollout: {temperature: 1.0e-300}\n", ["rollout.temperature", "0.01"]),
        ("rollout: {early_exit: {markers: [Wait, No]}}\n", ["markers.1: False", "quote it"]),
        ("rollout: {early_exit: {markers: [1]}}\n", ["markers.0: 1", "quote it"]),
        ("reward: {shaping: off}\n", ["reward.shaping: False", "'none'", "quote it"]),
        ("optimizer:\n", ["optimizer", "nothing below it"]),
        ("pruning: &a {prompts: *a}\n", ["alias"]),
        ("algorithm: {kl: {coef: 0.1, estimator: k1}}\n", ["algorithm.kl.estimator: k1", "k2", "apply_to"]),
        ("data.x: [" * 5000, ["nested too deeply"]),
        ("seed: 1\n\t- x\n", ["not YAML at line 5"]),
        ("seed: \0\n", ["not YAML"]),
        (BASE.encode("utf-16"), ["c.yaml is UTF-16", "UTF-8"]),
        (BASE.encode("utf-32"), ["c.yaml is UTF-32", "UTF-8"]),
        ((BASE + "# Übung\n").encode("latin-1"), ["not UTF-8 in line 4"]),
        (f"run: r\nmodel: {{path: {'m' * 300}}}\ndata: {{train: [a]}}\n".encode(), ["model.path", "255 bytes", "…"]),
        (b"run: ~/../~/x\nmodel: {path: m}\ndata: {train: [a]}\n", ["run", "~"]),
        (b"run: ~no_such_user/x\nmodel: {path: m}\ndata: {train: [a]}\n", ["run", "~USER"]),
        (b"run: $NO_SUCH_VARIABLE/x\nmodel: {path: m}\ndata: {train: [a]}\n", ["run", "NO_SUCH_VARIABLE is not set"]),
        (b"run: '${oc.env:HOME,x}'\nmodel: {path: m}\ndata: {train: [a]}\n", ["run", "${NAME}"]),
        (b"run: '~'\nmodel: {path: ~}\ndata: {train: [a]}\n", ["model.path: None"]),
    ],
)
def test_a_surprise_is_refused_with_its_reason(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    """One line that names the setting or the line of the file, the value, and what to write."""
    message = refusal(tmp_path, text)
    assert [word for word in words if word not in message] == [], message


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    """Ten levels of ten aliases are 10^10 values; the refusal comes at once."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 11)]
    assert "aliases counted" in refusal(tmp_path, "\n".join(lines).encode())


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("Use # for headings", None),
        ("Answer: be brief", None),
        (r"Put it in \boxed{}", None),
        ("- first think", None),
        ("yes", None),
        ("42", None),
        ("1e-5", None),
        ("2024-01-01", None),
        ("{{ x }}", None),
        ("[INST]", None),
        ("it's", None),
        ("'quoted'", "quoted"),
        (r'"a\nb"', "a\nb"),
        ("'two' words 'quoted'", None),
        ("null", ""),
        ("", ""),
    ],
)
def test_an_override_of_a_text_is_prose(tmp_path: Path, override: str, text: str | None) -> None:
    """A text keeps every character that the shell passed on; only quotes around all of it are YAML's."""
    got = load(tmp_path, "", f"data.system_prompt={override}").data.system_prompt
    assert (got or "") == (override if text is None else text)


def test_other_overrides_are_yaml_and_say_so(tmp_path: Path) -> None:
    assert load(tmp_path, "", "steps=1e3").steps == 1000
    assert load(tmp_path, "", "rollout.early_exit.markers=[Wait, 'No']").rollout.early_exit.markers == ["Wait", "No"]
    assert load(tmp_path, "", "data.chat_template_kwargs.enable_thinking=false").data.chat_template_kwargs == {
        "enable_thinking": False
    }
    for wrong, word in [
        ("rollout.early_exit.markers=[Wait", "quote it"),
        ("rollout.early_exit.markers=[Wait, No]", "quote it"),
        ("seed=010", "base 8"),
        ("optimizer.lr=nan", "finite"),
        ("optimizer.lr=2024-99-99", "quote it"),
    ]:
        assert word in refusal(tmp_path, "", wrong), wrong
    assert "nothing below it" in refusal(tmp_path, "optimizer:\n", "optimizer.lr=1e-5")


def test_paths_are_expanded_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` and variables, in files and overrides, in every setting that is a path; config.yaml gets the result."""
    home = str(tmp_path / "home")
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("SCRATCH", "/scratch")
    found = load(
        tmp_path, "", "run=~/r", "model.path=${SCRATCH}/m", "data.train=[$SCRATCH/a.jsonl, 'hf://datasets/a/b']",
        "data.eval=['${oc.env:HOME}/b.jsonl']", "rollout.servers.python=~/env/bin/python",
    )  # fmt: skip
    assert str(found.run) == f"{home}/r" and str(found.model.path) == "/scratch/m"
    assert [str(file) for file in found.data.train] == ["/scratch/a.jsonl", "hf:/datasets/a/b"]
    assert str(found.data.eval[0]) == f"{home}/b.jsonl"
    assert str(found.rollout.servers.python) == f"{home}/env/bin/python"
    assert "~" not in config.dump(found)
    assert str(load(tmp_path, "", "run=cost$/a~b").run) == "cost$/a~b"
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("seed: 7\n")
    assert load(tmp_path, "include: [~/base.yaml]\n").seed == 7
    assert "NO_SUCH is not set" in refusal(tmp_path, "include: [$NO_SUCH/base.yaml]\n")


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    assert load(tmp_path, b"\xef\xbb\xbf" + (BASE + "seed: 3\n").replace("\n", "\r\n").encode()).seed == 3


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    for place, word in [(tmp_path, "is not a file"), (tmp_path / ("x" * 5000), "cannot be read")]:
        with pytest.raises(UserError, match=word):
            config.load(place)


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    """Bytes exchanged, cut out and inserted at 400 places: read, or refused in lines without a traceback."""
    rng = random.Random(0)
    whole = (BASE + "optimizer: {lr: 1.0e-6, betas: [0.9, 0.95]}\nrollout: {early_exit: {markers: [Wait]}}\n").encode()
    refused = 0
    for _ in range(400):
        text = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 3)] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 3)))
        try:
            load(tmp_path, bytes(text))
        except UserError:
            refused += 1
    assert refused > 200
