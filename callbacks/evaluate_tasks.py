"""EvaluateTasks: runs zero-shot and few-shot tasks of the lm-evaluation-harness on the module's own model.

    python train.py validate --config configs/eval/paper_tasks.yaml --model.model_name_or_path DIR

Tasks are names that lm_eval knows; their data comes from the hub or its cache. Or they are YAML files of your own, which need
neither (https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/task_guide.md).
"""

import copy
import datetime
import difflib
import logging
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import distributed
from typing_extensions import override

from callbacks.base.after_run import AfterRun
from lightning_modules.causal_lm import CausalLM
from utilities.distributed import Processes, need_whole_weights
from utilities.extras import require
from utilities.files import write_json
from utilities.reporting import environment, log_scalars, print_table
from utilities.safe_load import brief

REPORT = "tasks.json"
LONGEST = datetime.timedelta(days=7)
"""Longest time that other processes wait for the first."""


class EvaluateTasks(AfterRun):
    """Evaluate a CausalLM on tasks after `validate` or `test`, or at the end of `fit` (pruning too); needs the extra `eval`.

    Results are printed as a table, written to `tasks.json` in the log directory, and logged as tasks/<task>/<metric>. With
    several processes, the first one evaluates on its own device and the others wait.

    Args:
        tasks: Names of tasks, groups or tags.
        task_path: Directory with task YAML files of your own. They may name Python functions, which are run.
        num_fewshot: Number of solved examples before each question; each task's own when None. A task that sets 0 keeps 0.
        limit: Number of questions of each task, or a share of them below 1; all when None.
        batch_size: Number of sequences that go through the model at a time.
    """

    def __init__(
        self,
        tasks: list[str],
        task_path: str | None = None,
        num_fewshot: int | None = None,
        limit: float | None = None,
        batch_size: int = 8,
    ) -> None:
        if not tasks or not all(isinstance(task, str) and task for task in tasks):
            raise ValueError(f"Argument `tasks` expected to be a list of names such as boolq but got {tasks!r}.")
        if num_fewshot is not None and num_fewshot < 0:
            raise ValueError(f"Argument `num_fewshot` expected to be at least 0 but got {num_fewshot}.")
        if limit is not None and (not (math.isfinite(limit) and limit > 0) or (limit > 1 and limit != int(limit))):
            raise ValueError(f"Argument `limit` expected a number of questions, or a share of them below 1, but got {limit}.")
        if batch_size < 1:
            raise ValueError(f"Argument `batch_size` expected to be at least 1 but got {batch_size}.")
        if task_path is not None and not Path(task_path).expanduser().is_dir():
            raise ValueError(f"Argument `task_path` = {task_path!r} is no directory. Give one with task YAML files.")
        self.tasks, self.task_path = tasks, None if task_path is None else str(Path(task_path).expanduser())
        self.num_fewshot, self.limit, self.batch_size = num_fewshot, limit, batch_size
        self.results: dict[str, dict[str, Any]] = {}
        """Task -> metrics, their standard errors, number of samples and shots."""
        self._manager: Any = None
        self._loaded: dict[str, Any] = {}
        self._processes = Processes()

    @override
    def setup(self, trainer: Trainer, pl_module: CausalLM, stage: str) -> None:
        """Load the tasks and their data, so that mistakes in them are told before the run starts."""
        if stage == "predict":
            return
        if not isinstance(pl_module, CausalLM):
            raise TypeError(f"EvaluateTasks needs a language model, CausalLM, but got {type(pl_module).__name__}.")
        require("eval", "lm_eval", "datasets")
        need_whole_weights(trainer, type(self).__name__)
        self._manager = self._find_tasks()
        if trainer.world_size > 1:  # a group of its own, since the others wait for hours: NCCL would give up
            group = distributed.new_group(backend="gloo", timeout=LONGEST)
            self._processes = Processes(trainer.global_rank, trainer.world_size, group)
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        try:
            with isolate_rng():
                self._loaded = self._manager.load(self.tasks)
        except Exception as error:  # datasets, the hub client and the task's own code share no base class below this one
            raise ValueError(
                f"Argument `tasks` = {self.tasks}: the data of one could not be loaded ({brief(error)}). A task of the hub "
                "needs a connection or a filled cache; one of your own, in `task_path`, names its files in dataset_kwargs."
            ) from error

    def _find_tasks(self) -> Any:
        """Find an index that has all names. That of `task_path` is tried first, since lm_eval's own takes seconds to read."""
        from lm_eval.tasks import TaskManager

        if self.task_path is not None:
            manager = TaskManager(include_path=self.task_path, include_defaults=False)
            if set(self.tasks) <= set(manager.all_tasks):
                return manager
        manager = TaskManager(include_path=self.task_path)
        if unknown := [task for task in self.tasks if task not in manager.all_tasks]:
            near = {name for task in unknown for name in difflib.get_close_matches(task, manager.all_tasks, 5, 0.5)}
            raise ValueError(
                f"Argument `tasks`: lm_eval has no {', '.join(unknown)}. Near: {', '.join(sorted(near)) or 'nothing'}. "
                "`lm-eval ls tasks` lists all; a task of your own is a YAML file in `task_path`."
            )
        return manager

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: CausalLM) -> None:
        before = pl_module.device
        pl_module.to(trainer.strategy.root_device)  # the trainer has sent it to the CPU
        super().on_fit_end(trainer, pl_module)
        pl_module.to(before)

    @override
    def after_run(self, trainer: Trainer, pl_module: CausalLM) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # every process is asked for it
        self.results = self._processes.first_of(lambda: self._run(trainer, pl_module))
        if not trainer.is_global_zero:
            return
        scalars = {
            f"tasks/{task}/{name}": value
            for task, result in self.results.items()
            for name, value in result.items()
            if name not in ("samples", "shots")
        }
        log_scalars(trainer.loggers, scalars, trainer.global_step)
        settings = {"tasks": self.tasks, "num_fewshot": self.num_fewshot, "limit": self.limit, "model": pl_module.described()}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / REPORT, {"results": self.results, **settings, **environment(pl_module.device)})
        print_table("Tasks", [*_rows(self.results), ("results", str(folder / REPORT))])

    def _run(self, trainer: Trainer, pl_module: CausalLM) -> dict[str, dict[str, Any]]:
        """Evaluate the model in this process."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        modes = {module: module.training for module in pl_module.modules()}
        limit = int(self.limit) if self.limit is not None and self.limit >= 1 else self.limit
        try:
            with isolate_rng(), torch.no_grad(), trainer.precision_plugin.forward_context():
                model = HFLM(
                    pretrained=pl_module.model,
                    tokenizer=copy.deepcopy(pl_module.tokenizer),  # it may get a padding token
                    batch_size=self.batch_size,
                )
                found = simple_evaluate(
                    model,
                    tasks=[*self._loaded["groups"].values(), *self._loaded["tasks"].values()],
                    num_fewshot=self.num_fewshot,
                    limit=limit,
                    task_manager=self._manager,
                    log_samples=False,
                    bootstrap_iters=1000,  # for metrics whose error has no formula
                )
        finally:
            for module, mode in modes.items():
                module.training = mode
        return {task: _measured(task, found) for task in found["results"]}


def _measured(task: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of a task by name, such as acc and acc_stderr. An output filter other than `none` follows after @."""
    values: dict[str, Any] = {}
    for key, value in found["results"][task].items():
        metric, _, output_filter = key.partition(",")
        if isinstance(value, (int, float)) and output_filter:
            values[metric if output_filter == "none" else f"{metric}@{output_filter}"] = float(value)
    samples = found.get("n-samples", {}).get(task, {}).get("effective")
    return values | {"samples": samples, "shots": found.get("n-shot", {}).get(task)}


def _rows(results: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Make a row for each metric, and one for the mean of acc over tasks."""
    rows = []
    for task, result in results.items():
        for name, value in result.items():
            if name in ("samples", "shots") or "_stderr" in name:
                continue
            metric, at, output_filter = name.partition("@")
            error = result.get(f"{metric}_stderr{at}{output_filter}")
            spread = "" if error is None or not math.isfinite(error) else f" ± {error:.4f}"
            count = "" if result["samples"] is None else f", {result['samples']} questions, {result['shots']} shots"
            rows.append((f"{task} {name}", f"{value:.4f}{spread}{count}"))
    accuracies = [result["acc"] for result in results.values() if "acc" in result]
    if len(accuracies) > 1:
        rows.append(("mean acc", f"{sum(accuracies) / len(accuracies):.4f} of {len(accuracies)} tasks"))
    return rows
