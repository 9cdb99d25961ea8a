"""Ownership of a directory of checkpoints: by one run, through one process at a time."""

import os
import threading
import time
from pathlib import Path

import pytest

from rdm_scale.checkpoint.ownership import OWNER, OwnerMark, Ownership, refuse_other_owner
from rdm_scale.errors import OwnershipError
from rdm_scale.storage.location import Location, ReplacedError
from tests.support.limits import HANG_S


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    location = Location(tmp_path) if request.param == "local" else request.getfixturevalue("memory")
    location.make_dir()
    return location


def mark_of(root: Location) -> OwnerMark:
    return OwnerMark.model_validate_json((root / OWNER).read())


def wait_until_taken(owner: Ownership) -> None:
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline:
        try:
            owner.check()
        except OwnershipError:
            return
        time.sleep(0.01)
    raise AssertionError("the process does not notice")


def test_another_run_is_refused_until_the_owner_ends_and_then_only_on_request(root: Location) -> None:
    refuse_other_owner(root, None, take_over=False)  # nobody's yet
    with Ownership.claim(root, "a", "runs/a") as owner:
        owner.confirm()
        refuse_other_owner(root, "a", take_over=False)
        with pytest.raises(OwnershipError, match=r"belong to the run in runs/a \(process \d+ on .*may be alive"):
            refuse_other_owner(root, "b", take_over=False)
        with pytest.raises(OwnershipError, match=r"set checkpoint.take_over=true, which is possible 60 s after"):
            Ownership.claim(root, "b", "runs/b")
        with pytest.raises(OwnershipError, match=r"was alive \d s ago"):
            Ownership.claim(root, "b", "runs/b", take_over=True)
        assert sorted(root.names()) == [OWNER]
    assert mark_of(root).run == "a" and mark_of(root).ended
    with pytest.raises(OwnershipError, match="that run has ended"):
        Ownership.claim(root, "b", "runs/b")
    with Ownership.claim(root, "b", "runs/b", take_over=True) as owner:
        owner.confirm()
        assert mark_of(root).run == "b"


def test_an_expired_lease_can_be_taken_on_request(root: Location) -> None:
    dead = OwnerMark(run="a", session="killed", run_dir="runs/a", process="process 1 on h")
    (root / OWNER).write(dead.model_dump_json().encode())
    time.sleep(0.3)
    with pytest.raises(OwnershipError, match="belong to the run in runs/a"):
        Ownership.claim(root, "b", "runs/b", lease_s=0.2)
    with pytest.raises(OwnershipError, match="was alive 0 s ago"):
        Ownership.claim(root, "b", "runs/b", take_over=True, lease_s=30)
    Ownership.claim(root, "b", "runs/b", take_over=True, lease_s=0.2).close()
    assert mark_of(root).run == "b"


def test_the_same_run_takes_its_place_at_once_and_the_earlier_process_stops(root: Location) -> None:
    first = Ownership.claim(root, "a", "runs/a", lease_s=0.3)
    second = Ownership.claim(root, "a", "runs/a")
    with pytest.raises(OwnershipError, match=r"was taken over by the run in runs/a .*nothing more is written"):
        first.confirm()
    first.close()  # does not write into what is another's now
    assert mark_of(root) == second.mark
    second.confirm()
    second.close()


def test_renewal_keeps_a_lease_and_notices_a_successor(root: Location) -> None:
    owner = Ownership.claim(root, "a", "runs/a", lease_s=6)
    before = (root / OWNER).modified()
    deadline = time.monotonic() + 30
    while (root / OWNER).modified() <= before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (root / OWNER).modified() > before
    with pytest.raises(OwnershipError, match=r"was alive \d+ s ago"):
        Ownership.claim(root, "b", "runs/b", take_over=True, lease_s=30)
    Ownership.claim(root, "a", "runs/a").close()
    wait_until_taken(owner)
    owner.close()


def test_a_damaged_mark_belongs_to_an_unknown_run(root: Location) -> None:
    (root / OWNER).write(b'{"format": "rdm_sc')
    with pytest.raises(OwnershipError, match="belong to an unknown run"):
        Ownership.claim(root, "a", "runs/a")


def test_of_processes_that_claim_at_once_one_wins(tmp_path: Path) -> None:
    start, winners, refused = threading.Barrier(8), list[Ownership](), list[str]()

    def claim(number: int) -> None:
        start.wait()
        try:
            winners.append(Ownership.claim(Location(tmp_path), f"run {number}", f"runs/{number}"))
        except OwnershipError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=claim, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1 and len(refused) == 7
    winners[0].confirm()
    winners[0].close()


def test_conditional_writes(root: Location) -> None:
    file = root / "file"
    file.write_if(b"one", None)
    with pytest.raises(ReplacedError):
        file.write_if(b"two", None)
    version = file.stat().version
    file.write_if(b"three", version)
    with pytest.raises(ReplacedError):
        file.write_if(b"four", version)
    assert file.read() == b"three" and root.names() == ["file"]


def test_ages_are_told_by_the_clock_of_the_store(tmp_path: Path) -> None:
    """A machine whose clock is an hour ahead finds that a file is as old as it is."""
    file = tmp_path / "file"
    file.write_bytes(b"x")
    os.utime(file, (1000.0, 1000.5))
    assert Location(file).modified() == 1000.5
