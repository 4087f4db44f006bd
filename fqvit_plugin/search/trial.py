"""One trial of an experiment, as NNI starts it: ``python -m fqvit_plugin.search.trial JOB FOLDER``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .nni_compat import import_nni
from .objective import Objective, Outcome, Setting, recipe_key
from .space import Space

__all__ = ['Job', 'main']


@dataclass(frozen=True)
class Job:
    """What every trial of an experiment must know, in one file.

    Args:
        setting: model and data.
        space: what is searched.
        folder: where outcomes are kept, a file per trial.
    """

    setting: Setting
    space: Space
    folder: Path

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        data = {'setting': vars(self.setting), 'space': self.space.to_dict(), 'folder': str(self.folder)}
        path.write_text(json.dumps(data, indent=2), encoding='utf-8')

    @classmethod
    def load(cls, path: Path) -> Job:
        """What :meth:`save` wrote."""
        data = json.loads(path.read_text(encoding='utf-8'))
        return cls(Setting(**data['setting']), Space.from_dict(data['space']), Path(data['folder']))

    def outcomes(self) -> Iterator[Outcome]:
        """All trials that finished, oldest first."""
        files = sorted(self.folder.glob('*.json'), key=lambda f: f.stat().st_mtime_ns)
        return (Outcome.from_dict(json.loads(f.read_text(encoding='utf-8'))) for f in files)

    def keep(self, outcome: Outcome) -> None:
        """Write an outcome, aside first: others read this folder while trials run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f'{outcome.trial}.json'
        aside = target.with_suffix('.part')
        aside.write_text(json.dumps(outcome.to_dict(), indent=2), encoding='utf-8')
        os.replace(aside, target)


def run(job: Job, point: dict[str, Any], trial: str) -> Outcome:
    """Measure the recipe of ``point``, or take what an earlier trial measured of the same recipe."""
    recipe = job.space.recipe(point)
    key = recipe_key(recipe)
    known = next((o for o in job.outcomes() if o.key == key), None)
    outcome = (
        dataclasses.replace(known, trial=trial) if known else Objective(job.setting).measure(recipe, trial=trial)
    )
    if job.space.budget is not None and outcome.num_bytes > job.space.budget:
        raise RuntimeError(f'the recipe takes {outcome.num_bytes} bytes, more than the space promised')
    job.keep(outcome)
    return outcome


def main(argv: list[str] | None = None) -> int:
    """Ask NNI for a point, measure it, report the score."""
    path, folder = sys.argv[1:] if argv is None else argv
    os.chdir(folder)  # NNI starts trials in folders of their own; paths in configs are relative to the user's
    nni = import_nni()
    point = nni.get_next_parameter()
    outcome = run(Job.load(Path(path)), point, nni.get_trial_id())
    nni.report_final_result(outcome.score)
    return 0


if __name__ == '__main__':
    sys.exit(main())
