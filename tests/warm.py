"""A Python that begins with everything imported: `python()` is its path, to be started in place of `sys.executable`.

A server imports torch, Transformers and this project once, in seconds that each of hundreds of processes would take
again, and is forked for every command. A command has a directory, environment, pipes, signals and exit code of its own,
and ends as any Python does; only what importing does to a process is not seen. What is about that starts
`sys.executable`. Commands whose environment holds other values of what is read while importing are not warm, either.

The program asks the server, hands on signals, and ends as the command did; if it is killed, so is the command, before
the server starts another: `kill` waits for that. In a command `sys.executable` is that program, so that launchers and
studies start theirs warm too.
"""

import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import time
import types
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

MODULES = (
    *("accelerate.commands.launch", "datasets", "matplotlib.pyplot", "peft", "scipy.stats", "torch._dynamo"),
    *("torch.distributed.run", "torch.utils.tensorboard", "transformers.models.gpt2.modeling_gpt2"),
    *("transformers.models.llama.modeling_llama", "lm_eval.evaluator", "lm_eval.models.huggingface"),
    *("hf_ibnorm.analysis.survey", "hf_ibnorm.convert.cost", "hf_ibnorm.swap.families", "hf_ibnorm.kernels.fused"),
    *("hf_ibnorm.modeling_ibnorm_gpt2", "hf_ibnorm.modeling_ibnorm_llama", "train_lm.push"),
    *("eval.runner", "eval.study.run", "train_lm.plan", "train_lm.train"),
)
READ_ON_IMPORT = ("HF_", "TRANSFORMERS_", "TRITON_", "PYTHONHASHSEED", "MPL")
SCRIPTS = ("accelerate", "hf-ibnorm", "hf-ibnorm-eval", "hf-ibnorm-train")
SHIM = """#!{real} -IS
import sys
sys.path.insert(0, {tests!r})
import warm
warm.client()
"""


def _read_on_import(environment):
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_ON_IMPORT) and not name.startswith(("HF_IBNORM_", "HF_MODULES_CACHE"))
    }


def serve(folder):
    """Import everything, then fork for each request; returns in a process that was forked, with what it is to do."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import yaml

    if yaml.__with_libyaml__:  # as in conftest.py
        yaml.SafeLoader = yaml.CSafeLoader
    gc.disable()
    for name in MODULES:
        __import__(name)
    sys.executable = str(folder / "python")
    gc.freeze()
    gc.enable()

    bell, rope = os.pipe()
    for end in (bell, rope):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(rope)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(bell, selectors.EVENT_READ)
    pids, holders, asked = {}, 0, False
    while True:
        ready = [key.fileobj for key, _ in selector.select()]
        for connection in pids.keys() & set(ready):
            if not connection.recv(1):  # whoever asked is gone
                selector.unregister(connection)
                connection.close()
                if (pid := pids.pop(connection)) is None:
                    holders -= 1
                else:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
        if not holders and asked:
            sys.exit(0)
        if bell in ready:
            os.read(bell, 4096)
            for connection, pid in list(pids.items()):
                if pid is not None and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    with suppress(OSError):
                        connection.sendall(f"{os.waitstatus_to_exitcode(ended[1])}\n".encode())
                    selector.unregister(connection)
                    connection.close()
                    del pids[connection]
        if listener in ready:
            connection, _ = listener.accept()
            asked, (request, handles) = True, _receive(connection)
            pid = None if request is None else os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (listener, selector, connection, *pids):
                    each.close()
                os.close(bell)
                os.close(rope)
                return request, handles
            for handle in handles:
                os.close(handle)
            holders += pid is None
            pids[connection] = pid
            selector.register(connection, selectors.EVENT_READ)
            if pid is not None:
                connection.sendall(f"{pid}\n".encode())


def become(request, handles):
    """Be the process that was asked for, up to its end."""
    os.setsid()
    for handle, standard in zip(handles, (0, 1, 2), strict=True):
        os.dup2(handle, standard)
        os.close(handle)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    import nltk
    import torch
    import transformers.dynamic_module_utils

    nltk.data.path[:0] = filter(None, os.environ.get("NLTK_DATA", "").split(os.pathsep))
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if "HF_MODULES_CACHE" in os.environ:
        transformers.dynamic_module_utils.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # it is imported already, yes
    words = request["words"][request["words"][0] == "-u" :]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(main))
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


@cache
def folder(packages=""):
    """Where the server is, for all processes of this run of the tests; started where there is none.

    One with `packages`, a folder, in front of all others is another one.
    """
    from filelock import FileLock

    home = Path(os.environ["HF_IBNORM_TESTS_WARM"], Path(packages).name)
    home.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))}
    with FileLock(home / "lock"):
        try:
            holder = socket.socket(socket.AF_UNIX)
            holder.connect(str(home / "socket"))
        except OSError:
            (home / "socket").unlink(missing_ok=True)
            (home / "environment.json").write_text(json.dumps({**os.environ, "real": sys.executable}))
            (home / "python").write_text(SHIM.format(real=sys.executable, tests=str(Path(__file__).parent)))
            (home / "python").chmod(0o755)
            for script in filter(Path.exists, map(Path(sys.executable).with_name, SCRIPTS)):
                _, _, rest = script.read_text().partition("\n")
                (home / script.name).write_text(f"#!{home / 'python'}\n{rest}")
                (home / script.name).chmod(0o755)
            with (home / "log").open("w") as log:
                words = [sys.executable, "-P", __file__, str(home)]  # this folder has packages of the same names
                subprocess.Popen(
                    words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            holder = _connected(home)
        _send(holder, None, ())
    _HOLDERS.append(holder)  # the server ends when the last one is closed
    return home


_HOLDERS = []


def _connected(home):
    end = time.monotonic() + 60
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(home / "socket"))
        except OSError:
            connection.close()
            if time.monotonic() > end:
                raise TimeoutError(f"the server in {home} did not start: {(home / 'log').read_text()}") from None
            time.sleep(0.01)
        else:
            return connection


def _send(connection, request, handles):
    content = json.dumps(request).encode()
    head = len(content).to_bytes(4, "little") + bytes([len(handles)])
    if handles:
        socket.send_fds(connection, [head], handles)
    else:
        connection.sendall(head)
    connection.sendall(content)


def _receive(connection):
    head, handles, _, _ = socket.recv_fds(connection, 5, 3)
    content, size = b"", int.from_bytes(head[:4], "little")
    while len(content) < size:
        content += connection.recv(size - len(content))
    return json.loads(content), handles


def _is_warm(home, words, environment):
    server = json.loads((home / "environment.json").read_text())
    known = words and (words[0] in ("-m", "-c", "-u") or not words[0].startswith("-"))
    return known and _read_on_import(environment) == _read_on_import(server)


def python(packages=""):
    """Path of a program that is Python, but for how long it takes to begin; with a folder `packages` before others."""
    return str(folder(str(packages)) / "python")


def kill(process):
    """SIGKILL to a command that was started with `python()`; returns when that has ended.

    A signal to the program itself would end the program at once, and the command some time after.
    """
    if process.poll() is None:
        command = int((Path(process.args[0]).parent / f"{process.pid}.command").read_text())
        with suppress(ProcessLookupError):
            os.kill(command, signal.SIGKILL)
        process.wait()  # the program ends as its command did


def path():
    """A PATH on which `python` and the scripts that this project installs are warm, for shells."""
    return os.pathsep.join([str(folder()), str(Path(sys.executable).parent), os.environ["PATH"]])


def client():
    """That program."""
    home = Path(sys.argv[0]).parent
    words, environment = sys.argv[1:], dict(os.environ)
    if not _is_warm(home, words, environment):
        real = json.loads((home / "environment.json").read_text())["real"]
        os.execv(real, [real, *words])
    forwarded = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)
    connection = _connected(home)
    _send(connection, {"words": words, "cwd": os.getcwd(), "environment": environment}, (0, 1, 2))
    answers = connection.makefile()
    pid = int(answers.readline())
    (home / f"{os.getpid()}.command").write_text(str(pid))
    for number in forwarded:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
    code = int(answers.readline() or "1")
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    become(*serve(Path(sys.argv[1])))
