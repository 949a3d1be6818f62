"""Network namespaces that stand for hosts: one for the server, at 10.7.0.1, with a link to each of the others."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Self

ADDRESS = "10.7.0.1"


def are_possible() -> bool:
    """Whether this process may make network namespaces and limit their packets."""
    if os.name != "posix" or os.geteuid() != 0 or None in (shutil.which("ip"), shutil.which("tc")):
        return False
    try:
        with Hosts(1) as hosts:
            hosts.narrow(0)
    except subprocess.CalledProcessError:
        return False
    return True


class Hosts:
    """`server` and `names` are the names of the namespaces, which exist within a `with` block."""

    def __init__(self, count: int) -> None:
        self.server = f"ema{os.getpid()}s"
        self.names = [f"ema{os.getpid()}r{index}" for index in range(count)]

    def __enter__(self) -> Self:
        try:
            _ip("netns", "add", self.server)
            self._in(self.server, "link", "set", "lo", "up")
            self._in(self.server, "addr", "add", f"{ADDRESS}/32", "dev", "lo")
            for index, name in enumerate(self.names):
                self._connect(index, name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (self.server, *self.names):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def narrow(self, index: int) -> None:
        """Have what a host sends wait for 0.5 Mbit/s, and be lost where more than two packets wait."""
        options = (
            "qdisc",
            "replace",
            "dev",
            "port",
            "root",
            "tbf",
            "rate",
            "500kbit",
            "burst",
            "1600",
            "limit",
            "3200",
        )
        subprocess.run(["tc", "-n", self.names[index], *options], check=True, capture_output=True)

    def widen(self, index: int) -> None:
        """Undo `narrow`."""
        subprocess.run(["tc", "-n", self.names[index], "qdisc", "del", "dev", "port", "root"], check=True)

    def mute(self, index: int) -> None:
        """Have nothing arrive of what a host sends; it still receives."""
        gateway = ("neigh", "replace", f"10.7.{index + 1}.1", "lladdr", "02:00:00:00:00:99", "dev", "port")
        self._in(self.names[index], *gateway, "nud", "permanent")

    def unmute(self, index: int) -> None:
        """Undo `mute`."""
        self._in(self.names[index], "neigh", "del", f"10.7.{index + 1}.1", "dev", "port")

    def set_link(self, index: int, state: str) -> None:
        """Set the link of a host `up` or `down`."""
        self._in(self.server, "link", "set", f"port{index}", state)  # that of the host would lose its route

    def _connect(self, index: int, name: str) -> None:
        _ip("netns", "add", name)
        self._in(name, "link", "set", "lo", "up")
        _ip("link", "add", "port", "netns", name, "type", "veth", "peer", "name", f"port{index}", "netns", self.server)
        for namespace, device, host in ((name, "port", 2), (self.server, f"port{index}", 1)):
            self._in(namespace, "addr", "add", f"10.7.{index + 1}.{host}/24", "dev", device)
            self._in(namespace, "link", "set", device, "up")
        self._in(name, "route", "add", ADDRESS, "via", f"10.7.{index + 1}.1")

    def _in(self, namespace: str, *arguments: str) -> None:
        _ip("-n", namespace, *arguments)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
