"""Rendezvous: the ranks of one attempt find each other and share a store.

Rank 0 hosts the store in its own process. Under torchrun the agents have a store of their own, which outlives a failed
attempt: it only passes on the address of rank 0's store, and the ranks retry until a store answers that this attempt
opened. Each process takes its rank's place in the store once, so that the store of an earlier attempt turns it away.
"""

import ipaddress
import itertools
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch.distributed as dist

from rdm_scale.errors import LaunchError, StopRequested
from rdm_scale.parallel.hosts import Hosts, rank_list
from rdm_scale.stop_request import StopRequest

_ADDRESS, _HOSTS, _FAILED = "address", "hosts", "failed"
_CONNECT_S = 5.0  # of one attempt to connect; also between looks at a request to stop
_RETRY_S = 0.1
_NOTE_AFTER_S = 15.0
_ADDRESS_S = 30.0
_DISCARD = 9  # port number; nothing is sent
_builds = itertools.count()  # meshes built one after the other in one process share a store

Result = TypeVar("Result")


@dataclass(frozen=True)
class RankStore:
    """Stores of the ranks that have met.

    Attributes:
        store: hosted by rank 0, new in each attempt.
        reports: for messages about failures. Under torchrun it is the agents', which outlives rank 0.
        hosts: host of every rank.
        interface: network interface that leads to the other hosts; None if all ranks are on this one.
    """

    store: dist.Store
    reports: dist.Store
    hosts: Hosts
    interface: str | None


@dataclass(frozen=True)
class _Place:
    """Place of this process among the ranks."""

    rank: int
    world_size: int
    master: tuple[str, int]
    prefix: str
    timeout_s: float
    stop: StopRequest | None
    token: str = field(default_factory=lambda: secrets.token_hex(8))  # tells this process from others of its rank

    @property
    def who(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"

    @property
    def has_agent(self) -> bool:
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


class _NotYet(Exception):  # noqa: N818
    """The other side is not ready; a later attempt may succeed."""


def meet(timeout_s: float, stop: StopRequest | None = None) -> RankStore:
    """Meet the other ranks, at MASTER_ADDR and MASTER_PORT.

    Raises:
        LaunchError: not all ranks have come within `timeout_s`; the message names those that are missing.
        StopRequested: this rank was asked to stop while it waited.
    """
    master = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    prefix = f"rdm_scale/{next(_builds)}"
    place = _Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), master, prefix, timeout_s, stop)
    if place.rank == 0:
        return _host(place)
    return _retry(place, lambda deadline: _join(place, deadline))


def _host(place: _Place) -> RankStore:
    """Open the store, wait for all ranks, and tell them who is there."""
    agent = _retry(place, lambda _: _agent_store(place)) if place.has_agent else None
    token = secrets.token_hex(8)
    try:
        server = dist.TCPStore(
            "127.0.0.1",
            0 if agent is not None else place.master[1],
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=place.timeout_s),
            multi_tenant=True,
        )
    except RuntimeError as error:  # DistNetworkError of EADDRINUSE, above all
        raise LaunchError(
            f"{place.who} cannot listen on MASTER_PORT={place.master[1]}: another program uses the port; "
            f"set MASTER_PORT to a free one ({str(error).splitlines()[0]})"
        ) from None
    store = dist.PrefixStore(place.prefix, server)
    store.set("token", token)
    _take_place(store, place)
    if agent is not None:
        address = _own_address(place.master[0])
        agent.set(f"{place.prefix}/{_ADDRESS}", json.dumps([address, server.port, token]))
    hosts = _wait_for_all(store, place)
    store.set(_HOSTS, hosts.to_json())
    return _met(place, store, dist.PrefixStore(token, agent or server), hosts)


def _wait_for_all(store: dist.Store, place: _Place) -> Hosts:
    deadline = time.monotonic() + place.timeout_s
    keys = [f"rank/{rank}" for rank in range(place.world_size)]
    while not store.check(keys):
        if _stop_requested(place):
            store.set(_FAILED, f"{place.who} was asked to stop")
            raise StopRequested
        if time.monotonic() > deadline:
            message = _missing(store, place)
            store.set(_FAILED, message)
            raise LaunchError(message)
        time.sleep(_RETRY_S)
    places = [json.loads(place) for place in store.multi_get(keys)]
    return Hosts.of([host for host, _ in places])


def _missing(store: dist.Store, place: _Place) -> str:
    there = [rank for rank in range(place.world_size) if store.check([f"rank/{rank}"])]
    known = [json.loads(content)[0] for content in store.multi_get([f"rank/{rank}" for rank in there])]
    names = dict(zip(there, known, strict=True))
    hosts = Hosts.of([names.get(rank, "?") for rank in range(place.world_size)])
    missing = rank_list([rank for rank in range(place.world_size) if rank not in names])
    return (
        f"{missing} of {place.world_size} did not come within {place.timeout_s:.0f} s (parallel.start_timeout_s); "
        f"there are {hosts.describe(there)}: look at the output of the missing ranks, and check that their nodes reach "
        f"{place.master[0]} and that all launchers were started with the same number of nodes"
    )


def _join(place: _Place, deadline: float) -> RankStore:
    """Connect to rank 0's store and take this rank's place in it; _NotYet if it is not there or of another attempt."""
    address, token, agent = place.master, None, None
    if place.has_agent:
        agent = _agent_store(place)
        if not agent.check([f"{place.prefix}/{_ADDRESS}"]):
            raise _NotYet("rank 0 has not come yet")
        host, port, token = json.loads(agent.get(f"{place.prefix}/{_ADDRESS}"))
        address = (place.master[0] if host is None else host, port)
    client = _connect(*address, place.timeout_s)
    store = dist.PrefixStore(place.prefix, client)
    try:
        store.wait(["token"], timedelta(seconds=_CONNECT_S))
        found = store.get("token").decode()
        if token not in (None, found):
            raise _NotYet(f"{address[0]}:{address[1]} belongs to another attempt")
        _take_place(store, place)
        while not store.check([_HOSTS]):
            if store.check([_FAILED]):
                raise LaunchError(store.get(_FAILED).decode())
            if _stop_requested(place):
                raise StopRequested
            if time.monotonic() > deadline:
                raise _NotYet(f"rank 0 at {address[0]} waits for other ranks")
            time.sleep(_RETRY_S)
        hosts = Hosts.from_json(store.get(_HOSTS))
    except RuntimeError as error:  # DistNetworkError, DistStoreError
        raise _NotYet(f"rank 0 at {address[0]}:{address[1]} has gone away ({str(error).splitlines()[0]})") from None
    return _met(place, store, dist.PrefixStore(found, agent or client), hosts)


def _take_place(store: dist.Store, place: _Place) -> None:
    """Enter this process as its rank, unless it was entered before the connection broke."""
    own = json.dumps([socket.gethostname(), place.token])
    found = store.compare_set(f"rank/{place.rank}", "", own).decode()
    if found != own:
        raise _NotYet(
            f"another process, on {json.loads(found)[0]}, is rank {place.rank} already: give each process its own RANK"
        )


def _met(place: _Place, store: dist.Store, reports: dist.Store, hosts: Hosts) -> RankStore:
    interface = _interface(place, store) if hosts.several else None
    return RankStore(store, reports, hosts, interface)


def _interface(place: _Place, store: dist.Store) -> str | None:
    """Network interface of this node that leads to the others.

    A host's own name may lead to a loopback address (127.0.1.1 on Debian), which the libraries would then announce to
    other hosts. The ranks beside rank 0 learn from the others by which address those know it.
    """
    own = _own_address(place.master[0])
    try:
        if own is not None:
            store.set(_ADDRESS, _datagram_address(place.master[0])[1][0])
        else:
            store.wait([_ADDRESS], timedelta(seconds=_ADDRESS_S))
            own = store.get(_ADDRESS).decode()
    except RuntimeError:  # hosts by name, but one network: any interface is right
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == own for each in addresses):
            return str(name)
    return None


def _own_address(master: str) -> str | None:
    """Address of this host on the way to `master`; None if `master` is this host."""
    try:
        family, address = _datagram_address(master)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            own, peer = probe.getsockname()[0], probe.getpeername()[0]
    except OSError:
        return None
    return None if own == peer or ipaddress.ip_address(own).is_loopback else own


def _datagram_address(host: str) -> tuple[socket.AddressFamily, Any]:
    found = socket.getaddrinfo(host, _DISCARD, type=socket.SOCK_DGRAM)[0]
    return found[0], found[4]


def _agent_store(place: _Place) -> dist.Store:
    return _connect(*place.master, place.timeout_s)


def _connect(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """Client of the store at an address; _NotYet, within seconds, if none answers."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_CONNECT_S))
    except socket.gaierror:
        raise _NotYet(f"the host {host} is unknown here: check MASTER_ADDR, or the name service of the nodes") from None
    except (OSError, RuntimeError) as error:
        raise _NotYet(f"{host}:{port} does not answer ({str(error).splitlines()[0]})") from None
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def _retry(place: _Place, attempt: Callable[[float], Result]) -> Result:
    """Call `attempt` until it succeeds or the time is up."""
    began = time.monotonic()
    noted, deadline = False, began + place.timeout_s
    while True:
        try:
            return attempt(deadline)
        except _NotYet as error:
            reason = str(error)
        if _stop_requested(place):
            raise StopRequested
        now = time.monotonic()
        if now > deadline:
            raise LaunchError(
                f"{place.who} did not meet the others within {place.timeout_s:.0f} s (parallel.start_timeout_s): "
                f"{reason}"
            )
        if not noted and now - began > _NOTE_AFTER_S:
            noted = True
            print(f"{place.who} waits for the others: {reason}", flush=True)
        time.sleep(_RETRY_S)


def _stop_requested(place: _Place) -> bool:
    return place.stop is not None and place.stop.requested
