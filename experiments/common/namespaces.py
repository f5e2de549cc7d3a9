"""Hosts on one machine: a network namespace each, joined by a switch, with a token bucket on both ends of every link.

The kernel sends what the hosts send, through its whole network stack, at the rate that the token buckets let through. Needs
Linux, root and iproute2; `require` says what is missing.
"""

from collections.abc import Iterator, Sequence
import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
from typing import NamedTuple

DEVICE = "eth0"  # of every host
BURST_BYTES = (
    32_768  # what a link can pass at once after a pause; a vote of a million parameters is four times as large
)
MTU = 9000  # jumbo frames: a sixth of the packets for the processors, which also have to be the switch
QUEUE_BYTES = 4_194_304  # what waits at a link before it drops; a host never waits for a packet that was lost
HEADER_BYTES = 66  # of a packet: Ethernet 14, IP 20, TCP 20 and its time stamps 12
PREFIX = "signopt"
HOSTS_FOLDER = pathlib.Path("/etc/netns")  # where `ip netns exec` looks for a namespace's own /etc/hosts

_CONGESTION_CONTROL = "/proc/sys/net/ipv4/tcp_congestion_control"
_CURE = (
    "Run it as root (`sudo`), in a container with `--privileged`, or where both capabilities NET_ADMIN and SYS_ADMIN are "
    "granted; the kernel needs its modules veth, bridge and sch_tbf."
)


class NetworkError(OSError):
    """Namespaces and links cannot be made here; the message says why, and what to do."""


class Network(NamedTuple):
    """Hosts that reach each other.

    Attributes:
      namespaces: The name of each host's namespace, in which `inside` starts a program.
      addresses: The IP address of each.
      switch: The namespace with the other ends of all links.
    """

    namespaces: tuple[str, ...]
    addresses: tuple[str, ...]
    switch: str


def require() -> None:
    """Check that links can be made here.

    Raises:
      NetworkError: If not.
    """
    if sys.platform != "linux":
        raise NetworkError(f"`slow_network` needs the network namespaces of Linux, and this is {sys.platform}.")
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if absent:
        raise NetworkError(
            f"`slow_network` makes its links with {' and '.join(f'`{tool}`' for tool in absent)}, which PATH does not "
            "have: install iproute2 (on Debian or Ubuntu `apt install iproute2`)."
        )
    with network(1) as found:
        shape(found, 1e9)


@contextlib.contextmanager
def network(count: int) -> Iterator[Network]:
    """Make hosts that reach each other, and remove them afterwards, whatever happened.

    A terminated process removes them too; those of a killed one are removed here by the next.

    Args:
      count: How many.

    Yields:
      The network, at full speed.

    Raises:
      NetworkError: If it cannot be made.
    """
    _remove(name for name in _namespaces() if name.startswith(f"{PREFIX}-") and not _alive(name))
    own = f"{PREFIX}-{os.getpid()}"
    found = Network(
        tuple(f"{own}-{i}" for i in range(count)), tuple(f"10.11.12.{i + 1}" for i in range(count)), f"{own}-switch"
    )
    names = [found.switch, *found.namespaces]
    with _terminated_like_interrupted():
        try:
            for name in names:
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", found.switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", found.switch, "link", "set", "bridge", "up")
            for i, (name, address) in enumerate(zip(found.namespaces, found.addresses, strict=True)):
                other_end = ("peer", "name", f"port{i}", "netns", found.switch)
                _ip("-n", name, "link", "add", DEVICE, "mtu", str(MTU), "type", "veth", *other_end)
                _ip("-n", found.switch, "link", "set", f"port{i}", "mtu", str(MTU))
                _ip("-n", found.switch, "link", "set", f"port{i}", "master", "bridge", "up")
                _ip("-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
                _ip("-n", name, "link", "set", DEVICE, "up")
                # The one that every kernel has; it fills a link that nobody else uses.
                _run(*inside(name, ["sh", "-c", f"echo reno > {_CONGESTION_CONTROL}"]))
                folder = HOSTS_FOLDER / name
                folder.mkdir(parents=True, exist_ok=True)
                # Gloo listens on the address of the host's own name.
                (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
            yield found
        finally:
            _remove(names)


def shape(found: Network, bits_per_second: float | None) -> None:
    """Put a token bucket on both ends of every link.

    Args:
      found: The hosts.
      bits_per_second: What each direction of a link lets through; None for all that comes.
    """
    ends = [(name, DEVICE) for name in found.namespaces]
    ends += [(found.switch, f"port{i}") for i in range(len(found.namespaces))]
    for name, device in ends:
        subprocess.run(  # there may be none yet
            ["tc", "-n", name, "qdisc", "delete", "dev", device, "root"], capture_output=True, check=False
        )
        if bits_per_second is not None:
            rate = ("rate", f"{bits_per_second:.0f}bit", "burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES))
            _run("tc", "-n", name, "qdisc", "add", "dev", device, "root", "tbf", *rate)


def inside(namespace: str, command: Sequence[str]) -> list[str]:
    """The command that runs another one on a host."""
    return ["ip", "netns", "exec", namespace, *command]


def dropped(found: Network) -> int:
    """How many packets the token buckets have dropped since the last `shape`."""
    ends = [(name, DEVICE) for name in found.namespaces]
    ends += [(found.switch, f"port{i}") for i in range(len(found.namespaces))]
    text = "".join(_run("tc", "-n", name, "-s", "qdisc", "show", "dev", device) for name, device in ends)
    return sum(int(part.split(",")[0]) for part in text.split("dropped ")[1:])


class Counted(NamedTuple):
    """What the kernel has counted on a network card.

    Attributes:
      bytes_sent: With headers.
      bytes_received: With headers.
      packets_sent: Each with `HEADER_BYTES`.
      packets_received: Likewise.
    """

    bytes_sent: int
    bytes_received: int
    packets_sent: int
    packets_received: int


def counted(text: str | None = None, *, device: str = DEVICE) -> Counted:
    """Read what the kernel has counted on a network card of this host.

    Args:
      text: That of `/proc/net/dev`, which is read if None.
      device: The card.

    Raises:
      NetworkError: If there is no such card.

    Examples:
      >>> counted("  eth0: 380 4 0 0 0 0 0 0 90 1 0 0 0 0 0 0")
      Counted(bytes_sent=90, bytes_received=380, packets_sent=1, packets_received=4)
    """
    text = pathlib.Path("/proc/net/dev").read_text(encoding="utf-8") if text is None else text
    for line in text.splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == device:
            numbers = [int(word) for word in counts.split()]
            return Counted(numbers[8], numbers[0], numbers[9], numbers[1])
    raise NetworkError(f"`counted(device=...)` has to name a network card of this host, got {device!r}.")


def _remove(names):
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        shutil.rmtree(HOSTS_FOLDER / name, ignore_errors=True)


def _namespaces():
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line]


def _alive(name):
    process = name.split("-")[1]
    return process.isdigit() and pathlib.Path("/proc", process).exists()


def _ip(*arguments):
    return _run("ip", *arguments)


def _run(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        raise NetworkError(
            f"`slow_network` is not permitted to make its links here: `{' '.join(command)}` says "
            f"{error.stderr.strip()!r}. {_CURE}"
        ) from None
    return done.stdout


@contextlib.contextmanager
def _terminated_like_interrupted():
    """Turn SIGTERM into an exception, which `finally` sees."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        del frame
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
