"""Everything that works round NNI 3.0, in one file: each function says what NNI does and what it does instead.

NNI 3.0 (2023) is archived; nothing here will be mended upstream.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ['amend_experiment', 'import_compression', 'import_nni', 'loopback_at', 'reserve_port', 'wait_for_server']

#: Loaded into NNI's node process before its own code. NNI's REST server listens on every interface, and its list
#: of experiments lies under the home folder, both without an option. And it gives the tuner, a process that imports
#: half of SciPy, ten seconds to come up, which a busy machine exceeds.
_PRELOAD = """\
const net = require('net');
const os = require('os');
const listen = net.Server.prototype.listen;
net.Server.prototype.listen = function (first, ...rest) {
  const port = typeof first === 'object' && first !== null ? first.port : first;
  if (port === undefined || typeof first === 'function') return listen.call(this, first, ...rest);
  if (typeof first === 'object') return listen.call(this, { ...first, host: '127.0.0.1' }, ...rest);
  return listen.call(this, port, '127.0.0.1', ...rest.filter((x) => typeof x !== 'string'));
};
os.homedir = () => process.env.FQVIT_NNI_HOME;
const wait = global.setTimeout;
global.setTimeout = function (call, delay, ...rest) {
  if (delay === 10000 && new Error().stack.includes('tuner_command_channel')) return wait(call, 120000, ...rest);
  return wait(call, delay, ...rest);
};
Object.defineProperties(global.setTimeout, Object.getOwnPropertyDescriptors(wait));
"""


def import_nni() -> Any:
    """The module ``nni``, without the deprecation warnings its import gives on today's Python.

    Raises:
        ValueError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            import nni
            import nni.experiment
    except ImportError as error:
        raise ValueError(f'the search needs nni 3.0: {error}') from None
    return nni


def import_compression() -> Any:
    """The package ``nni.compression.base``; its import warns of much that is deprecated today."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import nni.compression
        import nni.compression.base.compressor
        import nni.compression.base.config
    return nni.compression.base


def reserve_port() -> int:
    """A free port of the loopback interface; NNI's own default, 8080, is often taken."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port: int = probe.getsockname()[1]
    return port


def amend_experiment(folder: Path, config: Any) -> None:
    """Let a stopped experiment go on with ``config``.

    NNI resumes with what its database says: the old number of trials, and the old seed, with which a tuner would
    propose the same points once more.

    Raises:
        ValueError: ``folder`` holds no database of NNI.
    """
    database = folder / 'db' / 'nni.sqlite'
    if not database.is_file():
        raise ValueError(f'the experiment cannot be resumed: there is no {database}')
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute('UPDATE ExperimentProfile SET params = ?', (json.dumps(config.json()),))


def wait_for_server(process: subprocess.Popen[Any], port: int, seconds: float = 120.0) -> None:
    """Return when NNI's server at ``port``, run by ``process``, is ready; ``process`` is killed if it never is.

    NNI asks four times within three seconds and gives up. A busy machine needs longer to load the server's code; and
    until its database is open, the server answers ``INITIALIZING``, which NNI takes for broken JSON.

    Raises:
        RuntimeError: the process ended, or there was no answer for that many seconds.
    """
    from nni.experiment import rest

    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            if process.poll() is not None:
                raise RuntimeError(f'NNI did not start: its server ended with exit code {process.returncode}')
            with suppress(Exception):  # refused, or no JSON
                rest.get(port, '/check-status')
                return
            time.sleep(0.2)
        raise RuntimeError(f'NNI did not start: its server was not ready after {seconds:.0f} s; run the search again')
    except BaseException:  # an interrupt too: NNI does not know of the process yet
        process.kill()
        process.wait()
        raise


@contextmanager
def _patient_launcher() -> Iterator[None]:
    """NNI's launcher starts its server and waits until it is ready, before it asks anything."""
    from nni.experiment import launcher

    start: Any = launcher._start_rest_server

    def start_and_wait(arguments: Any, run_mode: Any) -> Any:
        process = start(arguments, run_mode)
        wait_for_server(process, arguments.port)
        return process

    changed: Any = launcher
    changed._start_rest_server = start_and_wait
    try:
        yield
    finally:
        changed._start_rest_server = start


@contextmanager
def loopback_at(folder: Path) -> Iterator[None]:
    """Keep NNI's server on 127.0.0.1 and its files, the list of experiments included, in ``folder``; wait for it.

    NNI would listen on every interface, write ``~/nni-experiments/.experiment``, ask proxies for localhost, and
    print its log to standard output; its log file in ``folder`` stays.
    """
    from nni.runtime.log import silence_stdout
    from nni.tools.nnictl.config_utils import Experiments

    home = folder / 'home'
    (home / 'nni-experiments').mkdir(parents=True, exist_ok=True)
    preload = folder / 'preload.cjs'
    preload.write_text(_PRELOAD, encoding='utf-8')
    silence_stdout()
    initialise: Any = Experiments.__init__
    defaults = initialise.__defaults__
    initialise.__defaults__ = (str(home / 'nni-experiments'),)
    # trials are children of the node process: they must find the interpreter's packages and nothing of ours
    changes = {
        'NODE_OPTIONS': f'--require {_quoted(preload)}',
        'FQVIT_NNI_HOME': str(home),
        'NO_PROXY': 'localhost,127.0.0.1',
        'no_proxy': 'localhost,127.0.0.1',
        'PATH': os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')]),
        'PYTHONPATH': os.pathsep.join(p for p in sys.path if p),
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    level = logging.getLogger('nni').level
    logging.getLogger('nni').setLevel(logging.ERROR)
    try:
        with _patient_launcher():
            yield
    finally:
        initialise.__defaults__ = defaults
        logging.getLogger('nni').setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _quoted(path: Path) -> str:
    """For NODE_OPTIONS, which is split at blanks."""
    escaped = str(path).replace('\\', '\\\\').replace('"', '\\"')
    return f'"{escaped}"'
