"""The Ray cluster that a study runs on: connecting to it, its nodes, and what each of them must have."""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, no_type_check

import ray
from ray.exceptions import RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pruning.errors import PrunescopeError, StudyError, first_line, shortened
from pruning.files import PARTIAL, is_folder

from ..configuration import StudyConfig
from .slots import Node

#: Packages whose versions must be the same everywhere, since results depend on them.
PACKAGES = ("prunescope", "torch", "transformers")
#: Bytes of Ray's object store where the cluster is started here: only messages pass through it.
_OBJECT_STORE = 100 << 20
#: Seconds to wait for the port of a cluster's head.
_PATIENCE = 5.0


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect this process to a cluster inside a ``with`` block.

    Parameters
    ----------
    address
        ``HOST:PORT`` of its head; empty: the cluster that this machine belongs to, or one that is started here.

    Raises
    ------
    StudyError
        If there is no cluster at that address, or this machine cannot take part in it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    already = ray.is_initialized()
    if address:
        _check_reachable(address)
    if not already:
        try:
            ray.init(address=address or "auto", **quiet)
        except ConnectionError as error:
            if address or os.environ.get("RAY_ADDRESS"):
                raise _unusable(address or os.environ["RAY_ADDRESS"], error) from error
            os.environ.setdefault("RAY_worker_niceness", "0")  # workers are this run: they do not give way to others
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            ray.init(
                address="local", num_cpus=cores, include_dashboard=False, object_store_memory=_OBJECT_STORE, **quiet
            )
        except (RuntimeError, ValueError) as error:
            raise _unusable(address or "this machine", error) from error
    try:
        yield
    finally:
        if not already:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself waits for minutes where nothing answers."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise StudyError(
            f'--on "ray:{shortened(address)}" is no address; write the HOST:PORT of the head, such as '
            "--on ray:10.0.0.1:6379"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise StudyError(
            f"there is no Ray cluster at {shortened(address)} ({first_line(error)}); start one with "
            f"ray start --head --port={port}, or let this machine start its own: --on ray"
        ) from error


def _unusable(place: str, error: Exception) -> StudyError:
    return StudyError(
        f"the Ray cluster at {shortened(place)} cannot be used from here: {first_line(error)}; the command must run on "
        "one of its nodes, with the cluster's versions of Ray and Python"
    )


def nodes() -> list[Node]:
    """Return the nodes that are alive."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    hosts = Counter(node["NodeManagerHostname"] for node in alive)
    found = []
    for node in alive:
        host, own = node["NodeManagerHostname"], node["Resources"]
        name = host if hosts[host] == 1 else f"{host}/{node['NodeID'][:6]}"
        memory = int(own.get("memory", 0))
        found.append(Node(node["NodeID"], name, own.get("CPU", 0.0), own.get("GPU", 0.0), memory))
    return found


def on_node(node: str) -> NodeAffinitySchedulingStrategy:
    """Return the strategy that runs something on one node, by its id, and nowhere else."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


def checked(found: Sequence[Node], folder: Path, study: StudyConfig) -> list[Node]:
    """Check that nodes have the same versions as this process, and see the folder of a study and that of its model.

    Returns
    -------
    list
        The nodes, without those that are lost meanwhile.

    Raises
    ------
    StudyError
        If a node lacks something; it is named.
    """
    here, folder = _versions(), folder.absolute()
    marker = folder / f".{uuid.uuid4().hex}{PARTIAL}"
    model = study.model if is_folder(study.model) else ""  # else it is downloaded
    _touch(marker)
    try:
        seen = _everywhere(found, _looking(), str(marker), model, PACKAGES)
    finally:
        marker.unlink(missing_ok=True)
    for node, (there, is_there, is_writable, has_model) in seen.items():
        _check_versions(node, there, here)
        if not is_there:
            raise StudyError(
                f"node {node.name} does not see the folder {folder}; choose one (--out) on storage that all nodes "
                "mount at the same path"
            )
        if not is_writable:
            raise StudyError(f"node {node.name} cannot write into {folder}; choose another folder (--out)")
        if not has_model:
            raise StudyError(
                f"node {node.name} does not have the model {model}; put it on storage that all nodes mount at the same "
                "path"
            )
    return list(seen)


def _touch(marker: Path) -> None:
    marker.touch()


def on_a_node(node: Node, error: PrunescopeError) -> PrunescopeError:
    """Return an error of the same kind that says which node it comes from."""
    return type(error)(f"node {node.name}: {error}")


def _everywhere(found: Sequence[Node], request: Callable[..., Any], *arguments: Any) -> dict[Node, Any]:
    """Return what a request returns on each node; nodes that are lost meanwhile are left out."""
    task = ray.remote(num_cpus=0)(request)
    asked = [task.options(scheduling_strategy=on_node(node.id)).remote(*arguments) for node in found]
    answers = {}
    for node, ref in zip(found, asked, strict=True):
        try:
            answers[node] = ray.get(ref)
        except TaskUnschedulableError:  # there is no such node any more
            continue
        except (RayError, ImportError) as error:
            raise StudyError(f"node {node.name} cannot run units: {_last_line(error)}") from error
    return answers


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shortened(lines[-1], 300) if lines else type(error).__name__


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def _check_versions(node: Node, there: dict[str, str], here: dict[str, str]) -> None:
    for name, own in here.items():
        if not there[name]:
            raise StudyError(f"node {node.name} has no {name}; install prunescope there, with the versions used here")
        if there[name] != own:
            raise StudyError(
                f"node {node.name} has {name} {there[name]}, but this process has {own}; install the same version"
            )


def _looking() -> Callable[..., tuple[dict[str, str], bool, bool, bool]]:
    """Return what is run on a node before it is known whether prunescope is there: it is sent as code, not by name."""

    @no_type_check  # what checks types could not be sent
    def look(marker: str, model: str, names: Sequence[str]) -> tuple[dict[str, str], bool, bool, bool]:
        import os
        import time
        from importlib.metadata import PackageNotFoundError, version
        from pathlib import Path

        versions = {}
        for name in names:
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                versions[name] = ""
        until = time.monotonic() + 5  # other machines' files may be seen late
        while not (there := Path(marker).exists()) and time.monotonic() < until:
            time.sleep(0.2)
        has_model = not model or any(Path(model).glob("*.safetensors"))
        return versions, there, os.access(Path(marker).parent, os.W_OK), has_model

    return look
