"""EvaluateTasks: what lm_eval finds for the module's model is what log-likelihoods taken by hand give."""

import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import BlockwisePruning, EvaluateTasks
from lightning_modules import CausalLM
from tests.helpers.launchers import go, quiet_trainer
from tests.helpers.recovery_runs import TextRun, loaded, short_windows
from tests.helpers.tiny import quiet, tiny_vit

QUESTIONS = 30


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Folder with two tasks on random questions: choices of one to four words, and a word to be generated."""
    folder = tmp_path_factory.mktemp("tasks")
    generator = torch.Generator().manual_seed(0)

    def words(count):
        return " ".join(f"w{i}" for i in torch.randint(2, 90, (count,), generator=generator).tolist())

    questions = [
        {"question": words(6), "choices": [words(1 + i) for i in range(4)], "label": number % 4, "answer": words(1)}
        for number in range(QUESTIONS)
    ]
    file = folder / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, questions)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {"task": "tiny_choice", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "label"}
    choice["metric_list"] = [{"metric": "acc"}, {"metric": "acc_norm"}]
    generate = {"task": "tiny_generate", "output_type": "generate_until", "doc_to_target": "{{answer}}"}
    generate["generation_kwargs"] = {"until": ["never"], "max_gen_toks": 1}
    generate["metric_list"] = [{"metric": "exact_match"}]
    for task in (choice, generate):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


@pytest.fixture
def text(text_file, tiny_model):
    return short_windows(tiny_model("llama"), text_file)


def by_hand(module, folder, shots=0):
    """Accuracy by log-likelihood, and by log-likelihood a character, question by question and choice by choice."""
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    plain, normed = [], []
    for question in questions:
        scores = []
        for choice in question["choices"]:
            asked = module.tokenizer(question["question"])["input_ids"]
            ids = torch.tensor([asked + module.tokenizer(choice)["input_ids"]])
            with torch.no_grad():
                logs = module.model(ids).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logs[i - 1, ids[0, i]]) for i in range(len(asked), ids.shape[1])))
        lengths = [len(choice) for choice in question["choices"]]
        plain.append(scores.index(max(scores)) == question["label"])
        relative = [score / length for score, length in zip(scores, lengths, strict=True)]
        normed.append(relative.index(max(relative)) == question["label"])
    return sum(plain) / len(plain), sum(normed) / len(normed)


def test_accuracies_are_those_of_log_likelihoods_by_hand(tasks, text, tiny_model, tmp_path, capsys):
    callback, module = EvaluateTasks(["tiny_choice"], str(tasks), batch_size=3), CausalLM(tiny_model("llama"))
    states = []
    for callbacks in ((), (callback,)):
        trainer = quiet(tmp_path, *callbacks)
        trainer.logger = TensorBoardLogger(tmp_path, name="", version="run")
        torch.manual_seed(0)
        trainer.validate(module, text, verbose=False)
        states.append(torch.get_rng_state())
    assert torch.equal(*states), "tasks draw no random numbers of the run"
    plain, normed = by_hand(module, tasks)
    assert 0 < plain < 1 and plain != normed
    result = callback.results["tiny_choice"]
    assert (result["acc"], result["acc_norm"]) == (plain, normed)
    assert (result["samples"], result["shots"]) == (QUESTIONS, 0)
    assert result["acc_stderr"] == pytest.approx((plain * (1 - plain) / (QUESTIONS - 1)) ** 0.5)

    shown = capsys.readouterr().out
    assert re.search(rf"tiny_choice acc +{plain:.4f} ± {result['acc_stderr']:.4f}, {QUESTIONS} questions, 0 shots", shown)
    report = json.loads((tmp_path / "run/tasks.json").read_text())
    assert report["results"]["tiny_choice"]["acc"] == plain and "torch" in report["versions"]
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert events.Scalars("tasks/tiny_choice/acc_norm")[0].value == pytest.approx(normed)
    assert module.tokenizer.pad_token is None, "the module's own tokenizer is left alone"


def test_after_pruning_the_pruned_model_is_evaluated(tasks, text, tiny_model, tmp_path):
    callback, module = EvaluateTasks(["tiny_choice"], str(tasks), limit=20), CausalLM(tiny_model("llama"))
    quiet(tmp_path, callback, BlockwisePruning(sparsity=0.7), max_epochs=None).fit(module, text)
    pruned = CausalLM(str(tmp_path / "pruned"))
    again = EvaluateTasks(["tiny_choice"], str(tasks), limit=20)
    quiet(tmp_path, again).test(pruned, text, verbose=False)
    assert again.results == callback.results and callback.results["tiny_choice"]["samples"] == 20
    quiet(tmp_path, whole := EvaluateTasks(["tiny_choice"], str(tasks))).validate(pruned, text, verbose=False)
    assert (whole.results["tiny_choice"]["acc"], whole.results["tiny_choice"]["acc_norm"]) == by_hand(pruned, tasks)


def test_generated_answers_and_examples(tasks, text, tiny_model, tmp_path):
    module = loaded(tiny_model("llama"))
    questions = [json.loads(line) for line in (tasks / "questions.jsonl").read_text().splitlines()]
    right = 0
    for number, question in enumerate(questions):
        with torch.no_grad():
            best = module.model(torch.tensor([module.tokenizer(question["question"])["input_ids"]])).logits[0, -1].argmax()
        word = module.tokenizer.decode(best)
        if number % 3 == 0 and word.startswith("w"):  # a third of the answers is what the model says
            question["answer"], right = word, right + 1
        elif word == question["answer"]:
            right += 1
    assert 5 < right < QUESTIONS
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    content = (tasks / "tiny_generate.yaml").read_text().replace(str(tasks), str(tmp_path))
    (tmp_path / "tiny_generate.yaml").write_text(content)
    quiet(tmp_path, plain := EvaluateTasks(["tiny_generate"], str(tmp_path))).validate(module, text, verbose=False)
    assert plain.results["tiny_generate"]["exact_match"] == pytest.approx(right / QUESTIONS)
    quiet(tmp_path, few := EvaluateTasks(["tiny_generate"], str(tmp_path), num_fewshot=2)).validate(module, text, verbose=False)
    assert few.results["tiny_generate"]["shots"] == 2 and few.results["tiny_generate"]["exact_match"] < right / QUESTIONS


@dataclass(frozen=True)
class EvaluationRun(TextRun):
    """Validation with a task; each process writes what it knows.

    Attributes:
        tasks: Folder.
    """

    tasks: str = ""

    def work(self):
        callback = EvaluateTasks(["tiny_choice"], self.tasks)
        trainer = quiet_trainer(self, Path(self.output), callbacks=[callback])
        trainer.validate(CausalLM(self.model), short_windows(self.model, self.text))
        Path(self.output, f"rank{trainer.global_rank}.json").write_text(json.dumps(callback.results))


def test_in_two_processes_the_first_evaluates_and_all_know(tasks, text_file, tiny_model, tmp_path):
    run, log = EvaluationRun(tiny_model("llama"), text_file, str(tmp_path), tasks=str(tasks)), tmp_path / "log"
    assert go(run, log=log) == [0, 0], log.read_text()[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    module = loaded(tiny_model("llama"))
    assert first == second and (first["tiny_choice"]["acc"], first["tiny_choice"]["acc_norm"]) == by_hand(module, tasks)
    assert log.read_text().count("tiny_choice acc ") == 1 and (tmp_path / "tasks.json").is_file()


def test_an_error_of_the_first_process_ends_all(tasks, text_file, tiny_model, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    content = yaml.safe_load((tasks / "tiny_choice.yaml").read_text()) | {"doc_to_choice": "{{nothing[0].here}}"}
    (broken / "tiny_choice.yaml").write_text(yaml.safe_dump(content))
    log = tmp_path / "log"
    assert go(EvaluationRun(tiny_model("llama"), text_file, str(tmp_path), tasks=str(broken)), log=log) == [1, 1]
    assert "nothing" in log.read_text()


def test_what_a_user_is_told(tasks, text, tiny_model, tmp_path, monkeypatch):
    for options, message in (
        ({"tasks": []}, "`tasks` expected to be a list of names such as boolq but got"),
        ({"tasks": ["boolq"], "limit": 1.5}, "`limit` expected a number of questions, or a share of them below 1, but got 1.5"),
        ({"tasks": ["boolq"], "num_fewshot": -1}, "`num_fewshot` expected to be at least 0 but got -1"),
        ({"tasks": ["boolq"], "batch_size": 0}, "`batch_size` expected to be at least 1 but got 0"),
        ({"tasks": ["boolq"], "task_path": "nowhere"}, "`task_path` = 'nowhere' is no directory. Give one with task YAML"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluateTasks(**options)
    module = CausalLM(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"lm_eval has no hellaswagg\. Near: .*hellaswag"):
        quiet(tmp_path, EvaluateTasks(["hellaswagg", "tiny_choice"], str(tasks))).validate(module, text)
    (tmp_path / "tiny_choice.yaml").write_text((tasks / "tiny_choice.yaml").read_text().replace("questions.jsonl", "no.jsonl"))
    with pytest.raises(ValueError, match=r"`tasks` = \['tiny_choice'\]: the data of one could not be loaded .*no\.jsonl"):
        quiet(tmp_path, EvaluateTasks(["tiny_choice"], str(tmp_path))).validate(module, text)
    with pytest.raises(TypeError, match="EvaluateTasks needs a language model, CausalLM, but got TinyViT"):
        quiet(tmp_path, EvaluateTasks(["tiny_choice"], str(tasks))).validate(tiny_vit(), [])
    monkeypatch.setattr("utilities.extras.find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    with pytest.raises(ModuleNotFoundError, match=r"lm_eval is not installed\. Run `pip install --editable '\.\[eval\]'`"):
        quiet(tmp_path, EvaluateTasks(["tiny_choice"], str(tasks))).validate(module, text)
