"""Processes on the hosts of a network: `experiments/common/host.py` on each, all given the same orders."""

from collections.abc import Callable, Iterator
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from experiments.common import namespaces

PORT = 9999  # nobody else is in the namespace


@contextlib.contextmanager
def running(network: namespaces.Network) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Start `experiments/common/host.py` on every host, and stop it afterwards.

    Args:
      network: The hosts.

    Yields:
      A function that gives all hosts an order, a function of `experiments/common/host.py` and its arguments, and returns their
      answers. It raises a `RuntimeError` with what a host has said if one does not answer.
    """
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "NPROC")}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    count = len(network.namespaces)
    with contextlib.ExitStack() as stack:
        processes, said = [], []
        for i, namespace in enumerate(network.namespaces):
            said.append(stack.enter_context(tempfile.TemporaryFile("w+")))
            command = [
                sys.executable,
                "-m",
                "experiments.common.host",
                f"{network.addresses[0]}:{PORT}",
                str(count),
                str(i),
            ]
            process = subprocess.Popen(
                namespaces.inside(namespace, command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said[-1],
                text=True,
                env=environment,
                cwd=pathlib.Path(__file__).parents[2],
                start_new_session=True,  # an interrupt is for us, who then stop it
            )
            processes.append(process)
            stack.callback(_stop, process)

        def ask(order, **arguments):
            with contextlib.suppress(BrokenPipeError):
                for process in processes:
                    process.stdin.write(json.dumps({"do": order} | arguments) + "\n")
                    process.stdin.flush()
            answers = []
            for i, process in enumerate(processes):
                line = process.stdout.readline()
                if not line:
                    said[i].seek(0)
                    raise RuntimeError(f"Host {i} of {count} has ended, and said:\n{said[i].read()[-4000:]}")
                answers.append(json.loads(line))
            return answers

        yield ask


def _stop(process):
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
