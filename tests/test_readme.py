"""README.md and docs/ are true: files, commands and settings that they name exist (tables: tests/benchmarks/test_tables.py)."""

import re
import shlex
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in (README, *sorted((ROOT / "docs").rglob("*.md")))
}
FOLDERS = "configs|benchmarks|results|functional|callbacks|lightning_modules|datamodules|utilities|tests|docs|locks"
LONGEST = 180
"""Lines of README.md."""
BASES = ("quickstart", "best", "deit/prune_digits", "csg2l/cora", "recover/smollm2_lora", "eval/paper_tasks")
"""Configs to which a setting that is named by itself may belong."""


def code_of(text: str) -> list[str]:
    """Lines of indented and of fenced code, continued lines joined."""
    lines, fenced = [], False
    for line in re.sub(r"\\\n\s*", "", text).split("\n"):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
    return lines


def commands(pattern: str) -> list[list[str]]:
    """Words of every command in the texts, from what the pattern finds on."""
    found = {line[match.start() :] for text in TEXTS.values() for line in code_of(text) if (match := re.search(pattern, line))}
    return [shlex.split(line, comments=True) for line in sorted(found)]


TRAIN = commands(r"(?<=train\.py )(fit|validate|test|predict) -")
BENCHMARKS = commands(r"(?<=python )(-m benchmarks\.|benchmarks/)")
INLINE = sorted(
    {match for text in TEXTS.values() for match in re.findall(r"`(--(?:trainer|model|data|ckpt_path)[^`<]*)`", text)}
)


@pytest.fixture(scope="module")
def parser():
    """The parser of train.py."""

    class Made(Exception):
        pass

    def stop(cli, parser, args):
        raise Made(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.CLI, "parse_arguments", stop)
        with pytest.raises(Made) as made:
            train.main(["fit"])
    return made.value.args[0]


def parses(parser, words: list[str]) -> bool:
    """Whether a command line is accepted."""
    try:
        parser.parse_args(words)
    except SystemExit:
        return False
    return True


def test_readme_is_short():
    assert TEXTS["README.md"].count("\n") <= LONGEST


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_named_exist(name):
    for path in set(re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./*-]*\w", TEXTS[name])):
        assert list(ROOT.glob(path)), path


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files(name):
    folder = (ROOT / name).parent
    for link in set(re.findall(r"\]\(([^)#\s]+)", TEXTS[name])):
        assert "://" in link or (folder / link).exists(), link


def test_commands_are_found():
    assert len(TRAIN) > 25 and len(BENCHMARKS) > 10 and len(INLINE) > 5


@pytest.mark.parametrize("words", TRAIN, ids=lambda words: " ".join(words)[:70])
def test_commands_can_be_given(words, parser, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word for word in words if word != "--print_config"]  # prints and exits
    config = words.index("--config") + 1
    if words[config] == "FILE" or words[config].startswith("logs/quickstart/"):  # which a run of this config writes
        words[config] = "configs/quickstart.yaml"
    assert parses(parser, words)


@pytest.mark.parametrize("option", INLINE)
def test_settings_that_are_named_exist(option, parser, monkeypatch, capsys):
    """A setting in running text belongs to a shipped config; one that is named without a value is asked for by a wrong one."""
    monkeypatch.chdir(ROOT)
    name, *value = shlex.split(option)
    refusals = []
    for base in BASES:
        if parses(parser, ["fit", "--config", f"configs/{base}.yaml", name, *(value or ["null"])]):
            return
        refusals.append(capsys.readouterr().err)
    known = [error for error in refusals if "nknown setting" not in error]
    assert known and not value, refusals


@pytest.mark.parametrize("words", BENCHMARKS, ids=" ".join)
def test_benchmarks_have_the_options_that_are_named(words):
    words = words[words[0] == "-m" :]
    path = ROOT / words[0].replace(".py", "").replace(".", "/")
    source = path.with_suffix(".py").read_text(encoding="utf-8")
    shared = (ROOT / "benchmarks/graph_runs.py").read_text(encoding="utf-8")
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in source or ("graph_runs" in source and f'"{option}"' in shared), option


def test_python_of_the_readme_prunes(tiny_model, text_file, tmp_path, monkeypatch, capsys):
    """The example as it stands, with a tiny model and text in place of those that it names."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)
    here = {"Qwen/Qwen3-0.6B": tiny_model("qwen3"), '"pydoc"': repr(text_file), "seq_len=512": "seq_len=16"}
    for given, replacement in here.items():
        assert given in code
        code = code.replace(given, replacement)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "val/perplexity" in capsys.readouterr().out
    assert (tmp_path / "qwen3-pruned" / "pruning.json").is_file()


def test_python_of_the_docs_prunes_a_matrix(capsys):
    """The example of a single matrix as it stands."""
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", TEXTS["docs/own-model.md"], re.DOTALL) if "prune_linear" in c]
    exec(compile(code, "docs/own-model.md", "exec"), {})
    sparsity, error = map(float, capsys.readouterr().out.split())
    assert sparsity == 0.5 and 0 < error < 0.5
