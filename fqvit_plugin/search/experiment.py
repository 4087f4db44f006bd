"""An NNI experiment on this machine: start or resume it, follow its trials, stop it."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .nni_compat import amend_experiment, import_nni, loopback_at, reserve_port
from .objective import Outcome
from .trial import Job

__all__ = ['TUNERS', 'Plan', 'run_experiment']

#: name for people -> NNI's name and its arguments
TUNERS: dict[str, tuple[str, dict[str, Any]]] = {
    'tpe': ('TPE', {'optimize_mode': 'maximize'}),
    'random': ('Random', {}),
    'anneal': ('Anneal', {'optimize_mode': 'maximize'}),
    'evolution': ('Evolution', {'optimize_mode': 'maximize', 'population_size': 8}),
    'grid': ('GridSearch', {}),
}
_SEEDED = ('tpe', 'random')
_POLL = 0.5


@dataclass(frozen=True)
class Plan:
    """How an experiment is run.

    Args:
        trials: how many at most, those before a resume included.
        concurrency: how many at a time.
        tuner: name in ``TUNERS``.
        patience: stop after this many finished trials without a better score; ``None`` for never.
        seed: of the tuner, where it takes one.
    """

    trials: int = 20
    concurrency: int = 1
    tuner: str = 'tpe'
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ('trials', 'concurrency', 'patience'):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        if self.tuner not in TUNERS:
            raise ValueError(f'tuner must be one of {", ".join(TUNERS)}, got {self.tuner!r}')

    def is_exhausted(self, scores: list[float]) -> bool:
        """Whether the last ``patience`` of ``scores`` brought nothing better."""
        if self.patience is None or len(scores) <= self.patience:
            return False
        return max(scores[-self.patience :]) <= max(scores[: -self.patience])


def run_experiment(
    job: Job, plan: Plan, folder: Path, *, resume: bool = False, say: Callable[[str], None] = lambda line: None
) -> list[Outcome]:
    """Run the trials of ``job`` and return what they measured, oldest first.

    Args:
        job: what a trial measures.
        plan: how many trials, and by which tuner.
        folder: everything NNI writes goes there, and nothing elsewhere.
        resume: go on with the experiment that ``folder`` holds.
        say: takes a line per finished trial.

    Raises:
        ValueError: there is nothing to resume, or nothing to search.
        RuntimeError: NNI broke off, or no trial finished; says where the logs are.
    """
    folder = folder.resolve()
    state = folder / 'experiment.json'
    if resume and not state.is_file():
        raise ValueError(f'{folder} holds no experiment to resume: start it without --resume')
    if not job.space.to_nni():
        raise ValueError('nothing to search: every group and option has a single value')
    import_nni()
    from nni.experiment import Experiment

    name = json.loads(state.read_text(encoding='utf-8'))['id'] if resume else None
    with loopback_at(folder):
        experiment = Experiment('local', id=name)
        # with the same seed a resumed tuner would propose the same points again
        _configure(experiment.config, job, plan, folder, plan.seed + len(list(job.outcomes())))
        if resume:
            amend_experiment(folder / 'nni' / experiment.id, experiment.config)
        try:
            (experiment.resume if resume else experiment.run)(reserve_port(), wait_completion=False)
            state.write_text(json.dumps({'id': experiment.id}), encoding='utf-8')  # now there is one to resume
            _follow(experiment, job, plan, say)
        finally:
            experiment.stop()
    outcomes = list(job.outcomes())
    if not outcomes:
        raise RuntimeError(f'no trial finished: {_complaint(folder / "nni" / experiment.id)}')
    return outcomes


def _configure(config: Any, job: Job, plan: Plan, folder: Path, seed: int) -> None:
    code = folder / 'code'  # NNI copies this folder for every trial: it holds the job and nothing else
    code.mkdir(parents=True, exist_ok=True)
    job.save(code / 'job.json')
    config.experiment_name = 'fqvit_plugin search'
    config.search_space = job.space.to_nni()
    trial = [sys.executable, '-m', 'fqvit_plugin.search.trial', str(code / 'job.json'), os.getcwd()]
    config.trial_command = shlex.join(trial)
    config.trial_code_directory = str(code)
    config.trial_concurrency = plan.concurrency
    config.max_trial_number = plan.trials
    config.experiment_working_directory = str(folder / 'nni')
    config.nni_manager_ip = '127.0.0.1'
    config.training_service.use_active_gpu = False
    config.tuner.name, arguments = TUNERS[plan.tuner]
    config.tuner.class_args = {**arguments, **({'seed': seed} if plan.tuner in _SEEDED else {})}


def _follow(experiment: Any, job: Job, plan: Plan, say: Callable[[str], None]) -> None:
    """Wait until NNI has no more trials, or they no longer improve."""
    told = {o.trial for o in job.outcomes()}
    failed: set[str] = set()
    while True:
        try:
            status, jobs = experiment.get_status(), experiment.list_trial_jobs()
        except Exception as error:
            raise RuntimeError(f'the NNI manager does not answer: {type(error).__name__}') from None
        outcomes = list(job.outcomes())
        for outcome in outcomes:
            if outcome.trial not in told:
                told.add(outcome.trial)
                say(_line(len(told), plan, outcome, max(o.score for o in outcomes)))
        for trial in jobs:
            if trial.status == 'FAILED' and trial.trialJobId not in failed:
                failed.add(trial.trialJobId)
                say(f'trial {trial.trialJobId} failed')
        if plan.is_exhausted([o.score for o in outcomes]):
            say(f'stopped: {plan.patience} trials without a better one')
            return
        if status == 'ERROR':
            raise RuntimeError('the NNI manager reports an error; see its log under the experiment folder')
        if status in ('DONE', 'STOPPED'):
            return
        time.sleep(_POLL)


def _line(count: int, plan: Plan, outcome: Outcome, best: float) -> str:
    mark = '  best so far' if outcome.score >= best else ''
    return (
        f'trial {count}/{plan.trials}: top-1 {outcome.top1:.2f} %, divergence {outcome.divergence:.4f}, '
        f'{outcome.num_bytes / 1e6:.3f} MB{mark}'
    )


def _complaint(folder: Path) -> str:
    """The last line that a trial wrote to its standard error, and where the rest is."""
    logs = sorted(folder.glob('environments/*/trials/*/trial.stderr'))
    lines = [line for log in logs for line in log.read_text(encoding='utf-8', errors='replace').splitlines()]
    last = lines[-1].strip() if lines else 'the trials left no message'
    return f'{last} (logs: {folder})'
